"""RoPE against its definition as a complex multiplication."""

import pytest
import torch

from xquant_vllm.projection.rope import RotaryTable, apply_rope


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_size", [64, 32])
def test_pairs_turn_by_position_times_frequency(interleaved, rotary_size):
    frequency = 10000.0 ** (-torch.arange(rotary_size // 2).float() / (rotary_size // 2))
    angles = torch.arange(50).float()[:, None] * frequency
    table = RotaryTable(angles.cos(), angles.sin(), interleaved)
    assert table.rotary_size == rotary_size
    x, positions = torch.randn(6, 3, 64), torch.tensor([0, 1, 7, 49, 3, 3])
    rotated = apply_rope(x, positions, table)

    pairs = x[..., :rotary_size]
    pairs = pairs.unflatten(-1, (-1, 2)) if interleaved else torch.stack(pairs.chunk(2, -1), -1)
    turn = torch.polar(torch.ones(6, rotary_size // 2), positions[:, None] * frequency)
    expected = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn[:, None])
    expected = expected.flatten(-2) if interleaved else torch.cat(expected.unbind(-1), -1)
    assert torch.allclose(rotated[..., :rotary_size], expected, atol=1e-5)
    assert torch.equal(rotated[..., rotary_size:], x[..., rotary_size:])
