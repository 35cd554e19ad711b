"""Whether a model will fit into memory, said before minutes are spent on loading it."""

import json
from pathlib import Path

import torch

from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.progress import say
from xquant_vllm.projection.factor_file import dtype_name

# Beside the weights: activations grow with the model, PyTorch and the logits of a window are about the same for all.
_OVER_WEIGHTS, _BESIDE = 1.3, 10**9
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def warn_of_memory(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, doing: str, instead: str) -> None:
    """Say it on standard error if a model will hardly fit.

    Args:
        checkpoint: the model.
        dtype: of its weights in memory.
        device: where they will be.
        doing: what is about to be done with it.
        instead: what to set.
    """
    if problem := memory_problem(checkpoint, dtype, device, doing):
        say(f"warning: {problem}; it may be killed. {instead}")


def memory_problem(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, doing: str) -> str | None:
    """Why a model will hardly fit into memory; None if it will.

    Args:
        checkpoint: the model.
        dtype: of its weights in memory.
        device: where they will be.
        doing: what is about to be done with it.
    """
    available, weights = available_memory(device), num_weights(checkpoint)
    needed = int(weights * dtype.itemsize * _OVER_WEIGHTS) + _BESIDE
    if available is None or needed <= available:
        return None
    return (
        f"{doing} {checkpoint.name} in {dtype_name(dtype)} takes about {needed / 1e9:.1f} GB of memory "
        f"({weights / 1e9:.1f} billion weights of {dtype.itemsize} bytes, and what computes with them), but "
        f"{available / 1e9:.1f} GB are free"
    )


def num_weights(checkpoint: Checkpoint) -> int:
    """How many weights a checkpoint has, from the headers of its safetensors files."""
    total = 0
    for path in set(checkpoint.files.values()):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError):
            continue  # who reads the tensors will say what is wrong with it
        for name, tensor in header.items():
            if name != "__metadata__":
                total += torch.Size(tensor["shape"]).numel()
    return total


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be had, within the limit of a container; None where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [size for size in (_of_machine(_MEMINFO), _of_container(_CGROUP)) if size is not None]
    return min(found, default=None)


def _of_machine(meminfo: Path) -> int | None:
    """As Linux estimates it: free memory and what the page cache would give back."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _of_container(cgroup: Path) -> int | None:
    """What version 2 of Linux's control groups leaves: the limit without what is used, but for the page cache."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        pages = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(pages["inactive_file"]) + int(pages["active_file"]))
    except (OSError, ValueError, KeyError):
        return None  # "max" for no limit, or no such files
