"""Folders in which a server keeps what took time to make."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xquant_vllm.scheme.factor_cache_folder import cache_folder

# A folder with more files is not counted to its end.
_MOST_FILES = 100_000


def caches(environment: Mapping[str, str], vllm_root: str | None) -> dict[str, Any]:
    """By name: ``folder``, ``exists``, ``writable``, ``files`` and ``bytes``.

    Args:
        environment: the process's variables.
        vllm_root: vLLM's own folder, if it was asked; None: it is where vLLM would have it.
    """
    home = _home(environment)
    xdg = environment.get("XDG_CACHE_HOME")
    user = Path(xdg) if xdg else home and home / ".cache"
    root = vllm_root or environment.get("VLLM_CACHE_ROOT")
    vllm = Path(root) if root else user and user / "vllm"
    triton = environment.get("TRITON_CACHE_DIR")
    triton_home = environment.get("TRITON_HOME")
    of_triton = Path(triton_home) if triton_home else home
    return {
        "factors": describe_folder(cache_folder()),
        "vllm_compiled": describe_folder(vllm and vllm / "torch_compile_cache"),
        "triton": describe_folder(Path(triton) if triton else of_triton and of_triton / ".triton" / "cache"),
    }


def describe_folder(folder: Path | None) -> dict[str, Any]:
    """A folder as it is; one that is not there is writable if it can be made. Nothing is written."""
    if folder is None:
        return {"folder": None, "exists": False, "writable": False, "files": 0, "bytes": 0}
    nearest = folder.absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    files, size = _count(folder)
    return {
        "folder": str(folder),
        "exists": folder.is_dir(),
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        "files": files,
        "bytes": size,
    }


def _count(folder: Path) -> tuple[int, int]:
    """Files and their bytes, of a folder and those inside of it."""
    files = size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
            files += 1
            if files >= _MOST_FILES:
                return files, size
    return files, size


def _home(environment: Mapping[str, str]) -> Path | None:
    try:
        return Path(environment["HOME"]) if environment.get("HOME") else Path.home()
    except RuntimeError:  # no HOME, and no entry in the list of users
        return None
