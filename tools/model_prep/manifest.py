"""The list of a checkpoint's files, by which a later run knows that the folder is whole and up to date."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from .recipe import Recipe

NAME = "xquant-manifest.json"
_RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "gguf", "accelerate", "safetensors")


def sha256_of(path: Path) -> str:
    """Checksum of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _recipe_of(recipe: Recipe) -> dict[str, Any]:
    """What must be the same for a folder to be up to date."""
    content: dict[str, Any] = {
        "model": recipe.name,
        "revision": recipe.revision,
        "source": [{"package": wheel.requirement, "sha256": wheel.sha256} for wheel in recipe.wheels],
    }
    if recipe.base is not None:
        content["base"] = _recipe_of(recipe.base)
    return content


def _files_of(folder: Path) -> Any:
    """What a folder's list says of its files; None if there is no list that can be read."""
    try:
        return json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(folder: Path, recipe: Recipe, base: Path | None = None) -> None:
    """Record every file that is in the folder now, and those of the base's folder, if it was made from one."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    content = {
        "recipe": _recipe_of(recipe),
        "title": recipe.title,
        "versions": {"python": platform.python_version(), **{name: _version_of(name) for name in _RECORDED_PACKAGES}},
        "files": {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
            for path in files
        },
    }
    if base is not None:
        content["base_files"] = _files_of(base)
    (folder / NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def problem(folder: Path, recipe: Recipe, base: Path | None = None) -> str | None:
    """Why the folder cannot be used as it is; None if it can.

    Sizes are compared before checksums, so that a truncated file is found at once. A base that is not there any more
    is no problem; one that was built anew with other files is.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        files, made_by = dict(content["files"]), content["recipe"]
    except FileNotFoundError:
        return f"it has no {NAME}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {NAME} cannot be read ({type(error).__name__}: {error})"
    if made_by != _recipe_of(recipe):
        return "it was made from another source or by an older recipe"
    if base is not None and (base_files := _files_of(base)) is not None and base_files != content.get("base_files"):
        return f"{base.name}, from which it was made, has changed since"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
    for name, expected in files.items():
        if sha256_of(folder / name) != expected["sha256"]:
            return f"{name} is not what was written (checksum differs)"
    return None
