"""Rotary tables of position embeddings that a module of transformers makes."""

from collections.abc import Iterator

import torch

from xquant_vllm.plugin.load.transformers_backend.calls import RotaryCall
from xquant_vllm.projection.rope import RotaryTable

_SHORT = 16


class DynamicAnglesError(Exception):
    """A position is turned by other angles when a longer sequence is in the batch."""


class RotaryTables:
    """Tables of the calls of one model, shared between layers: kernels keep a rearranged copy of every table."""

    def __init__(self, length: int) -> None:
        """Make tables of ``length`` positions."""
        self._length = length
        self._made: dict[RotaryCall, list[RotaryTable]] = {}

    def of(self, call: RotaryCall, head_size: int) -> list[RotaryTable]:
        """Every rotation that the output of a call may stand for.

        Args:
            call: made position embeddings.
            head_size: channels of a head, of which no more can be turned.

        Returns:
            The tables: with pairs of both kinds, and an angle per pair or, twice, one per channel. Empty if the output
            is not a cosine and a sine of every position.

        Raises:
            DynamicAnglesError: the angles of a position depend on which other positions there are.
        """
        if call not in self._made:
            self._made[call] = list(_tables(call, self._length))
        return [table for table in self._made[call] if table.rotary_size <= head_size]


def _tables(call: RotaryCall, length: int) -> Iterator[RotaryTable]:
    waves = _waves(call, length)
    if waves is None:
        return
    # In this order: what a long sequence brings about may last.
    short = _waves(call, min(length, _SHORT))
    if short is None or any(
        not torch.allclose(of_short, of_long[: of_short.shape[0]], atol=1e-5)
        for of_short, of_long in zip(short, waves, strict=True)
    ):
        raise DynamicAnglesError
    cos, sin = waves
    halves, pairs = [wave.chunk(2, -1) for wave in waves], [(wave[:, 0::2], wave[:, 1::2]) for wave in waves]
    for kept in (halves, pairs):
        if cos.shape[1] % 2 == 0 and all(torch.equal(one, other) for one, other in kept):
            once = [wave.contiguous() for wave, _ in kept]
            for interleaved in (False, True):
                yield RotaryTable(once[0], once[1], interleaved)
    for interleaved in (False, True):
        yield RotaryTable(cos, sin, interleaved)


def _waves(call: RotaryCall, length: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosine and sine of the positions up to ``length``, ``[length, angles]`` each, FP32; None if it is no such call.

    In FP32, since the module makes them in the dtype of the hidden states that it is shown.
    """
    positions = torch.arange(length, device=call.positions.device)
    made = call.at(positions, torch.float32)
    if not isinstance(made, tuple | list) or len(made) != 2:
        return None
    waves = []
    for wave in made:
        if not isinstance(wave, torch.Tensor) or not wave.is_floating_point() or wave.dim() < 2:
            return None
        if wave.shape[-2] != length or wave.numel() != length * wave.shape[-1]:
            return None
        waves.append(wave.reshape(length, -1).float())
    return (waves[0], waves[1]) if waves[0].shape == waves[1].shape else None
