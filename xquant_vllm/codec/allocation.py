"""How many bits every channel of a latent gets: reverse water-filling on the error that its quantization causes.

An error in channel c costs ``v_c * e^2``, with e relative to the channel's own root mean square and ``v_c`` its
weighted variance. Bits go where they save most, until the budget is spent; a channel that saves least gets none and is
not stored (T. M. Cover, J. A. Thomas, *Elements of Information Theory*, section 10.3.3).
"""

import heapq
from collections.abc import Sequence

import torch

# What codes of so many bits leave of a Gaussian channel's variance, with the uniform step that leaves least
# (J. Max, *Quantizing for minimum distortion*, IRE Trans. Inform. Theory 6, 1960), and that step over the deviation.
DISTORTION = {0: 1.0, 2: 0.1188, 3: 0.03744, 4: 0.01154, 6: 0.001040, 8: 0.0000866}
STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 6: 0.1041, 8: 0.0308}
# Channels that share their number of bits: four make whole bytes (for 3 bits two times four do), as few as possible in
# a narrow latent. Kernels go through a wide one in bands, which must end at a multiple of 16 channels.
_NARROW, _TOGETHER, _WIDE_TOGETHER = 256, 4, 16
# Channels of a run at most, so that a band holds at least one.
_LONGEST_RUN = 256

Runs = tuple[tuple[int, int], ...]
"""Bits and number of channels, bits descending; channels beyond are not stored."""
LayerAllocation = tuple[tuple[Runs, ...], ...]
"""Runs of every stream and latent head of a layer, as calibrated factors have them."""


def run_bytes(runs: Runs) -> int:
    """Bytes of one token's codes."""
    return sum(bits * channels for bits, channels in runs) // 8


def allocate(variances: Sequence[torch.Tensor], budget: int) -> list[Runs]:
    """Share a budget out among latent heads.

    Args:
        variances: of every latent head ``[width]``, descending, in one unit of measure; the width is a multiple of 4,
            and of 16 if it is above 256.
        budget: bytes per token for the codes of all of them.

    Returns:
        The bits of every head's channels; they take at most ``budget`` bytes.

    Raises:
        ValueError: the budget is not even enough for the first channels of every head.
    """
    ladder = sorted(DISTORTION)
    sizes = [_TOGETHER if v.numel() <= _NARROW else _WIDE_TOGETHER for v in variances]
    gains = [v.double().unflatten(0, (-1, size)).mean(1).tolist() for v, size in zip(variances, sizes, strict=True)]
    steps = [[0] * len(of_head) for of_head in gains]
    heap: list[tuple[float, int, int]] = []

    def offer(head: int, at: int) -> None:
        step = steps[head][at]
        if step + 1 < len(ladder):
            low, high = ladder[step], ladder[step + 1]
            saved = (DISTORTION[low] - DISTORTION[high]) / (high - low)
            heapq.heappush(heap, (-gains[head][at] * saved, head, at))

    left = budget * 8
    for head, of_head in enumerate(gains):
        # No head is without any channel, however little it matters.
        steps[head][0] = 1
        left -= ladder[1] * sizes[head]
        for at in range(len(of_head)):
            offer(head, at)
    if left < 0:
        raise ValueError(f"{budget} bytes are too few for {len(gains)} latent heads")
    while heap:
        _, head, at = heapq.heappop(heap)
        step = steps[head][at]
        cost = (ladder[step + 1] - ladder[step]) * sizes[head]
        if cost <= left:
            left -= cost
            steps[head][at] += 1
            offer(head, at)
    for of_head, size in zip(steps, sizes, strict=True):
        if size == _TOGETHER:
            left = _even_threes(of_head, ladder, left)
    _spend_byte(steps, gains, sizes, ladder, left)
    return [_runs([ladder[step] for step in of_head], size) for of_head, size in zip(steps, sizes, strict=True)]


def _even_threes(steps: list[int], ladder: list[int], left: int) -> int:
    """Make the number of 3-bit units even: one goes up where the budget has room, else one down; what is left then."""
    three = ladder.index(3)
    threes = [at for at, step in enumerate(steps) if step == three]
    if len(threes) % 2 == 0:
        return left
    if left >= _TOGETHER:
        steps[threes[0]] += 1
        return left - _TOGETHER
    steps[threes[-1]] -= 1
    return left + _TOGETHER


def _spend_byte(
    steps: list[list[int]], gains: list[list[float]], sizes: list[int], ladder: list[int], left: int
) -> None:
    """Spend a byte that evening out has left, so that heads with one budget take the same bytes."""
    best: tuple[float, list[int], int] | None = None
    for of_head, of_gains, size in zip(steps, gains, sizes, strict=True):
        for at, step in enumerate(of_head):
            if step + 1 == len(ladder) or (ladder[step + 1] - ladder[step]) * size != 8 or left < 8:
                continue
            saved = of_gains[at] * (DISTORTION[ladder[step]] - DISTORTION[ladder[step + 1]])
            # Bits must not ascend: only the first of those with as many may have more.
            if (best is None or saved > best[0]) and (at == 0 or of_head[at - 1] > step):
                best = (saved, of_head, at)
    if best is not None:
        best[1][best[2]] += 1


def _runs(bits_of_units: list[int], size: int) -> Runs:
    assert bits_of_units == sorted(bits_of_units, reverse=True), "variances must descend"
    runs: list[tuple[int, int]] = []
    for bits in sorted({bits for bits in bits_of_units if bits}, reverse=True):
        channels = size * bits_of_units.count(bits)
        whole, rest = divmod(channels, _LONGEST_RUN)
        runs += [(bits, _LONGEST_RUN)] * whole + ([(bits, rest)] if rest else [])
    return tuple(runs)
