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
    """Make room for ``size`` bytes. Not for use once graphs were captured: the buffer may move."""
    buffer = _buffers.get(device)
    if buffer is None or buffer.numel() < size:
        _buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)


def fix(device: torch.device) -> None:
    """From now on :func:`take` finds everything reserved, or fails."""
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

    Raises:
        RuntimeError: the buffer is fixed and too small.
    """
    needed = bytes_of(*parts)
    held = _buffers[device].numel() if device in _buffers else 0
    if needed > held:
        if device in _fixed:
            raise RuntimeError(f"xquant: attention needs {needed} bytes of workspace, but only {held} were reserved")
        reserve(device, needed)
    if device not in _buffers:
        reserve(device, 0)
    buffer, start, taken = _buffers[device], 0, []
    for shape, dtype in parts:
        size = math.prod(shape) * dtype.itemsize
        taken.append(buffer[start : start + size].view(dtype).view(shape))
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return taken
