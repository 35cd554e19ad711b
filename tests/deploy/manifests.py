"""The manifests of docker/kubernetes, and how to find things in them."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
SERVING = ("cpu.yaml", "gpu.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    """The objects of a file."""
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def kind(name: str, wanted: str) -> dict[str, Any]:
    """The one object of a kind in a file."""
    (found,) = (document for document in documents(name) if document["kind"] == wanted)
    return found


def pod(name: str) -> dict[str, Any]:
    """What the Deployment of a file makes pods of: metadata and spec."""
    return kind(name, "Deployment")["spec"]["template"]


def container(name: str) -> dict[str, Any]:
    """The one container of its pods."""
    (found,) = pod(name)["spec"]["containers"]
    return found


def environment(name: str) -> dict[str, str]:
    """The container's variables that have a plain value."""
    return {entry["name"]: entry["value"] for entry in container(name)["env"] if "value" in entry}


def mounts(name: str) -> dict[str, dict[str, Any]]:
    """The container's mounts by the path."""
    return {mount["mountPath"]: mount for mount in container(name)["volumeMounts"]}
