"""The process that imports torch, loads the kernels and calls them: which there are, which are used, do they agree."""

import sys
from typing import Any

from xquant_vllm.diagnosis.child import Found, find_out, tell
from xquant_vllm.diagnosis.processor import NEEDED

# Triton compiles for a GPU what it has not in its cache.
_SECONDS = 300


def ask_kernels(device_type: str | None) -> Found:
    """Ask in a process of its own: ``torch``, ``gpus``, ``cpp``, ``triton``, ``choice``, ``attention``.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``, as vLLM says; None: CUDA where torch sees a GPU.
    """
    return find_out(__name__, device_type or "", seconds=_SECONDS)


def main() -> None:
    """Answer, in that process."""
    given = sys.argv[2]

    def device_type() -> str:
        import torch

        return given or ("cuda" if torch.cuda.is_available() else "cpu")

    tell(
        iter(
            (
                ("torch", _torch),
                ("gpus", _gpus),
                ("triton", _triton),
                ("cpp", _cpp),
                ("choice", lambda: _choice(device_type())),
                ("attention", lambda: _attention(device_type())),
            )
        )
    )


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu_seen": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = torch.cuda.get_device_capability(index)
        found.append(
            {
                "name": properties.name,
                "compute_capability": f"{capability[0]}.{capability[1]}",
                "memory": properties.total_memory,
                "shared_memory_of_a_program": _shared_memory(index),
            }
        )
    return found


def _shared_memory(index: int) -> int | None:
    """Bytes, as Triton says; None where it cannot."""
    try:
        import torch

        from xquant_vllm.attention.gpu.limits import shared_memory

        return shared_memory(torch.device("cuda", index))
    except Exception:
        return None


def _triton() -> dict[str, Any]:
    import triton

    return {"version": triton.__version__}


def _cpp() -> dict[str, Any]:
    """Of the C++ kernels for CPUs; raises where they cannot be loaded."""
    from xquant_vllm.attention.cpu import library as cpu

    there = [name for name in NEEDED if cpu.set_isa(name)]
    cpu.set_isa(None)
    return {
        "library": str(cpu.LIBRARY_PATH),
        "best": cpu.isa(),
        "there": there,
        "why_no_amx": cpu.tiles_refused(),
        "threads": cpu.num_threads(),
    }


def _choice(device_type: str) -> dict[str, Any]:
    """What a server's log says of its kernels, and which those are: ``cpp``, ``triton`` or ``reference``."""
    from xquant_vllm.attention import dispatch

    text = dispatch.describe(device_type)
    module = str(getattr(dispatch.select(device_type), "__name__", ""))
    kind = "cpp" if ".cpu." in module else "triton" if ".gpu." in module else "reference"
    isa = None
    if kind == "cpp":
        from xquant_vllm.attention.cpu import library as cpu

        isa = cpu.isa()
    return {"kind": kind, "instruction_set": isa, "device": device_type, "text": text}


def _attention(device_type: str) -> list[dict[str, Any]]:
    from xquant_vllm.attention import dispatch
    from xquant_vllm.diagnosis.attention_check import check_attention

    if device_type not in ("cpu", "cuda"):
        raise RuntimeError(f"there are no kernels for {device_type!r}")
    return check_attention(dispatch.select(device_type), device_type)
