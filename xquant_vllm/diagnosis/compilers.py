"""Compilers, and what each is needed for."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

_SECONDS = 10
NEEDED_FOR = {
    "g++": "builds the C++ kernels when this package is installed; on CPUs vLLM's torch.compile calls it at start-up",
    "python_headers": "with g++, for vLLM's torch.compile on CPUs",
    "cc": "on GPUs Triton calls it at start-up",
}


def compilers() -> dict[str, Any]:
    """By name: ``command``, ``version`` (both None where it is not there) and ``needed_for``."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    found = {
        "g++": _compiler(shlex.split(os.environ.get("CXX", "")) or ["g++"]),
        "python_headers": {"command": str(header) if header.is_file() else None, "version": None},
        "cc": _compiler([shutil.which(os.environ.get("CC") or "gcc") or "clang"]),
    }
    return {name: {**of, "needed_for": NEEDED_FOR[name]} for name, of in found.items()}


def _compiler(command: list[str]) -> dict[str, Any]:
    if shutil.which(command[0]) is None:
        return {"command": None, "version": None}
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=False, timeout=_SECONDS, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return {"command": None, "version": None}
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return {"command": shlex.join(command) if done.returncode == 0 else None, "version": lines[0] if lines else None}
