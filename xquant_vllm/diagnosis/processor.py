"""The processor, and what of it the C++ kernels ask for."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_VNNI = (*_AVX512, "avx512_vnni", "avx512vbmi")
NEEDED = {
    "amx": (*_VNNI, "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    "vnni": _VNNI,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": (),
}
"""Flags, as Linux names them, that an instruction set of the C++ kernels needs, as csrc/cpu/isa.cpp has it; the fastest
first."""

_INFO = Path("/proc/cpuinfo")


def processor(info: Path = _INFO) -> dict[str, Any]:
    """Model, architecture, flags that kernels ask for, and cores that this process may use.

    Args:
        info: Linux's description of the processor.
    """
    lines: dict[str, str] = {}
    try:
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            lines.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    there = set(lines.get("flags", "").split())
    asked = dict.fromkeys(flag for flags in NEEDED.values() for flag in flags)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": lines.get("model name"),
        "architecture": platform.machine(),
        "flags": [flag for flag in asked if flag in there],
        "cores": cores,
    }


def missing_flags(isa: str, flags: Sequence[str]) -> list[str]:
    """What a processor with these flags lacks for an instruction set."""
    return [flag for flag in NEEDED[isa] if flag not in flags]
