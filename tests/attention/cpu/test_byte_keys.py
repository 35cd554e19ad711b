"""Key up-projections and latents in 8 bits."""

import pytest
import torch

from tests.attention.attention_cases import Spec, make_plan
from xquant_vllm.attention.cpu.byte_keys import byte_keys, has_byte_keys, round_latents, shares_latents


@pytest.mark.parametrize("width", [64, 72])
def test_integers_are_the_up_projection(width: int) -> None:
    up = torch.randn(3, width, 16, generator=torch.Generator().manual_seed(0))
    up[1, :, 5] = 0
    keys = byte_keys(up)
    padded = -(-width // 16) * 16
    assert keys.integers.shape == (3, 2, padded // 4, 8)
    quads = keys.integers.transpose(2, 3).reshape(3, 16, padded // 4).contiguous()
    integers = quads.view(torch.int8).view(3, 16, padded)
    assert (integers[..., width:] == 0).all()
    assert torch.equal(keys.offsets, -128 * integers.sum(-1, dtype=torch.int32))
    read = integers[..., :width].transpose(1, 2) * keys.units.unsqueeze(1)
    assert (read - up).abs().le(0.5001 * keys.units.unsqueeze(1)).all()
    assert integers.abs().amax(-1)[keys.units > 1e-20].eq(127).all()


def test_round_latents() -> None:
    latents = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    latents[3] = 0
    rounded = round_latents(latents)
    step = latents.abs().amax(-1, keepdim=True) / 126.9375
    assert (rounded - latents).abs().le(0.5001 * step).all()
    assert (rounded[3] == 0).all()


def test_no_ties_beside_the_largest() -> None:
    """Codes of a token with one scale and a zero of minus half of their range, and the half of the largest."""
    largest = torch.linspace(0.1, 3, 100).unsqueeze(-1)
    latents = torch.cat((largest, largest / 2, largest * (2 * torch.arange(16) / 15 - 1)), -1)
    expected = round_latents(latents)
    nudged = latents * torch.cat((torch.ones(1), torch.full((17,), 1 + 2.0**-22)))
    torch.testing.assert_close(round_latents(nudged), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "shared", "in_bytes"),
    [
        (Spec(kind="x", key_outliers=0), True, True),
        (Spec(kind="deltas", earlier=(4, 2), key_bits=3, key_outliers=0), True, True),
        (Spec(kind="x", key_outliers=0, kv_heads=1), False, False),
        (Spec(kind="x", key_outliers=1), True, False),
        (Spec(kind="x", key_outliers=0, key_bits=8), True, False),
        (Spec(kind="deltas", earlier=(8, 2), key_outliers=0), True, False),
        (Spec(kind="x", allocated=1.0), True, False),
        (Spec(joint=True), True, False),
        (Spec(), False, False),
    ],
)
def test_which_layers(spec: Spec, shared: bool, in_bytes: bool) -> None:
    plan = make_plan(spec)
    assert shares_latents(plan) == shared
    assert has_byte_keys(plan) == in_bytes
