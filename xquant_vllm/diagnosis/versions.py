"""Versions of what a server is made of, and those that are supported. Imports none of it."""

import importlib.metadata
import platform
import sys
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from xquant_vllm import __version__
from xquant_vllm.plugin.compat import SUPPORTED_VLLM

SUPPORTED = {
    "python": ">=3.10",
    "vllm": SUPPORTED_VLLM,
    # `xquant factorize --calibration` and `xquant eval`
    "transformers": ">=4.56",
    # `make triton-matrix`
    "triton": ">=3.7,<3.10",
}
"""Ranges; torch is the one that vLLM was built for."""

_PACKAGES = ("torch", "vllm", "triton", "transformers")


def installed_versions() -> dict[str, Any]:
    """By name; None for what is not installed.

    Packages are found by what they hold: vLLM for CPUs is distributed under another name, which is told, too.
    """
    owners = importlib.metadata.packages_distributions()
    found: dict[str, Any] = {"xquant-vllm": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        names = owners.get(package, [])
        found[package] = _version(names[0]) if names else None
    vllm = owners.get("vllm", [])
    found["vllm_distribution"] = vllm[0] if vllm else None
    found["system"] = platform.platform()
    found["executable"] = sys.executable
    return found


def is_supported(package: str, version: str) -> bool:
    """Whether a version is in the range of a package; one that is no version is."""
    try:
        return Version(Version(version).base_version) in SpecifierSet(SUPPORTED[package])
    except InvalidVersion:
        return True


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
