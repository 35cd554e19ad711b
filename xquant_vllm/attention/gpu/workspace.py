"""Scratch memory of the kernels: one buffer per device, reserved before anything else takes the memory.

vLLM runs the model once at its largest batch and then gives what memory is left to the cache; what the kernels need
must be there by then, and must not grow or move afterwards: CUDA graphs keep its addresses.
"""

import math

import torch

_ALIGNMENT = 256
_buffers: dict[torch.device, torch.Tensor] = {}
_fixed: set[torch.device] = set()


def bytes_of(*parts: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes that :func:`take` of these parts needs."""
    return sum(-(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in parts)


def reserve(device: torch.device, size: int) -> None:
    """Make room for ``size`` bytes.

    Raises:
        RuntimeError: the buffer is fixed and smaller.
    """
    buffer = _buffers.get(device)
    if buffer is not None and buffer.numel() >= size:
        return
    if device in _fixed:
        held = 0 if buffer is None else buffer.numel()
        raise RuntimeError(f"xquant: attention needs {size} bytes of workspace, but only {held} were reserved")
    _buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)


def fix(device: torch.device) -> None:
    """From now on the buffer neither grows nor moves."""
    _fixed.add(device)


def release(device: torch.device) -> None:
    """Give the memory back."""
    _buffers.pop(device, None)
    _fixed.discard(device)


def take(device: torch.device, *parts: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    """Uninitialized tensors that lie side by side in the buffer; whoever takes next overwrites them.

    Args:
        device: where.
        parts: shapes and dtypes.
    """
    reserve(device, bytes_of(*parts))
    buffer, start, taken = _buffers[device], 0, []
    for shape, dtype in parts:
        size = math.prod(shape) * dtype.itemsize
        taken.append(buffer[start : start + size].view(dtype).view(shape))
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return taken
