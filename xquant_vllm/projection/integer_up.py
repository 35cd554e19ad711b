"""Key up-projections that are integers in 8 bits, so that kernels may multiply codes by integers and lose nothing.

Codes are small integers, and CPUs and GPUs multiply integers of 8 bits several times as fast as they do FP32. Rounding
an up-projection to them would cost accuracy. Rounding it *before* the down-projection is made does not: ``W = D U``
holds for every invertible U with ``D = W U^-1``, so the down-projection makes good what the up-projection lost.

A column of a group of channels is ``unit * integers``, its largest integer 127. Channels of more than 4 bits, and
those kept in FP16, stay as they are: kernels have 16 bits for the former, whose codes would leak into others otherwise.
"""

from collections.abc import Iterator

import torch

from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.allocation import STEP
from xquant_vllm.codec.layout import Stream
from xquant_vllm.projection.basis import LatentBasis

BYTE_BITS = 4
"""Bits of a code that is multiplied by an integer of 8 bits; codes of more are multiplied by one of 16."""
LARGEST_BYTE = 127
# Of a unit: an up-projection of integers that went through FP32 is this close to them.
_EXACT = 1e-3
# Kernels cut wider latents of runs into bands and sum these up one by one, each with units of its own.
_WIDEST = 256


def with_integer_up(basis: LatentBasis, stream: Stream) -> LatentBasis:
    """The basis with its up-projection rounded to integers, and a down-projection that makes this good.

    Args:
        basis: per head or joint.
        stream: how its latents are stored.

    Returns:
        A basis of the same function, on the same device; the one given where there is nothing to round.
    """
    heads, head_size = basis.down.shape[0], basis.up.shape[2]
    # Of a latent head the columns of all kv heads that read it, side by side.
    up = basis.up.double().unflatten(0, (heads, -1)).transpose(1, 2).flatten(2)
    rounded = up.clone()
    for head in range(heads):
        for rows, weight in _byte_channels(stream, head):
            weighted = up[head, rows] * weight.to(up).unsqueeze(-1)
            unit = _units(weighted)
            rounded[head, rows] = (weighted / unit).round() * unit / weight.to(up).unsqueeze(-1)
    if torch.equal(rounded, up):
        return basis
    rounded = rounded.float().double()
    down = _made_good(basis.down, up, rounded).to(basis.down.dtype)
    return LatentBasis(down, rounded.unflatten(2, (-1, head_size)).transpose(1, 2).flatten(0, 1).float().contiguous())


def byte_units(weighted: torch.Tensor) -> torch.Tensor | None:
    """What the integers of every column count, if a matrix is such integers of 8 bits.

    Args:
        weighted: ``[channels, columns]`` FP64: rows of an up-projection whose channels share scales, times the steps of
            their codes.

    Returns:
        ``[columns]`` FP64, with which ``weighted / units`` are integers but for the rounding to FP32; or None.
    """
    units = _units(weighted)
    integers = weighted / units
    return units if bool((integers.round() - integers).abs().max() <= _EXACT) else None


def _units(weighted: torch.Tensor) -> torch.Tensor:
    return (weighted.abs().amax(0) / LARGEST_BYTE).clamp_min(1e-30)


def _byte_channels(stream: Stream, head: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Of a latent head the channels that share scales and are rounded, and the steps of their codes."""
    if isinstance(stream, AllocatedFormat):
        if stream.width > _WIDEST:
            return
        runs = stream.runs[head]
        first = sum(count for bits, count in runs if bits > BYTE_BITS)
        steps = [STEP[bits] for bits, count in runs for _ in range(count) if bits <= BYTE_BITS]
        if steps:
            yield slice(first, first + len(steps)), torch.tensor(steps)
        return
    if stream.bits > BYTE_BITS:
        return
    for group in range(stream.num_groups):
        first = group * stream.group_size
        kept = stream.outlier_channels if group == 0 else 0
        yield slice(first + kept, first + stream.group_size), torch.ones(stream.group_size - kept)


def _made_good(down: torch.Tensor, up: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The down-projection with which ``rounded`` gives what ``down`` gave with ``up``: ``[heads, hidden_size, width]``.

    Where ``rounded`` is nearly singular an exact one would have enormous channels. So a departure from ``down`` costs
    as much as the mean error of rounding: what is lost of such a direction is less than that.
    """
    error = rounded - up
    penalty = error.square().sum((-2, -1)) / up.shape[1]
    ridge = penalty[:, None, None] * torch.eye(up.shape[1], dtype=up.dtype, device=up.device)
    exact = down.double()
    gram = rounded @ rounded.mT + ridge
    wanted = exact @ (up @ rounded.mT + ridge)
    return torch.linalg.solve(gram, wanted.mT).mT.contiguous()
