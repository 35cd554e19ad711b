"""What a figure was measured on: the processor decides which kernels run, and how far they are from 16 bit."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from xquant_vllm.attention.cpu import library as cpu

_ROOT = Path(__file__).resolve().parents[2]
_CPUINFO = Path("/proc/cpuinfo")
_L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
    "amx_bf16",
)  # fmt: skip
"""Of the processor's flags, as Linux spells them, those that choose kernels: ours, vLLM's and oneDNN's."""


def machine_facts() -> dict[str, Any]:
    """Processor, threads, versions and commit; of a checkout without git the commit is None."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **processor_facts(_read(_CPUINFO), _read(_L3)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.isa(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "vllm", "xquant-vllm")},
        "commit": _commit(),
    }


def processor_facts(cpuinfo: str, l3: str) -> dict[str, Any]:
    """Name, family and model, flags that choose kernels, and the size of the last cache.

    Args:
        cpuinfo: /proc/cpuinfo; of another system nothing.
        l3: the size of the third cache, as Linux says it; empty where it says none.
    """
    first = cpuinfo.partition("\n\n")[0].splitlines()
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
    flags = said.get("flags", "").split()
    return {
        "processor": said.get("model name") or platform.processor() or platform.machine(),
        "family": int(said["cpu family"]) if "cpu family" in said else None,
        "model": int(said["model"]) if said.get("model", "").isdigit() else None,
        "flags": [flag for flag in FLAGS if flag in flags],
        "l3": l3.strip() or None,
    }


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
