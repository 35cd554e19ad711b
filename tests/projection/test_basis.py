"""The latent basis: lossless without quantization in every shape and dtype, kinder to quantization than K itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_vllm.codec.quantizer import dequantize, quantize
from xquant_vllm.projection.basis import factorize, latent_shape


def latents_of(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.einsum("td,hdw->thw", x, down)


def rebuild(latents: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.einsum("thw,hws->ths", latents.expand(-1, up.shape[0], -1), up).flatten(1)


@settings(max_examples=30, deadline=None)
@given(
    kv_heads=st.integers(1, 4),
    head_size=st.sampled_from([8, 40, 64]),
    hidden=st.sampled_from([24, 96, 257]),
    kind=st.sampled_from(["head", "joint"]),
    outliers=st.integers(0, 3),
    rotate=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_lossless_without_quantization(kv_heads, head_size, hidden, kind, outliers, rotate, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(kv_heads * head_size, hidden, generator=generator)
    basis = factorize(weight, kv_heads, kind, outlier_channels=outliers, rotate=rotate, seed=seed, dtype=torch.float32)
    heads, width = latent_shape(kv_heads, head_size, kind)
    assert basis.down.shape == (heads, hidden, width)
    assert basis.up.shape == (kv_heads, width, head_size)
    x = torch.randn(9, hidden, generator=generator)
    expected = x @ weight.T
    assert torch.allclose(
        rebuild(latents_of(x, basis.down), basis.up), expected, atol=2e-4 * expected.abs().max().item()
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_the_up_projection_makes_good_the_rounding_of_the_down_projection(dtype, tolerance):
    torch.manual_seed(0)
    weight = torch.randn(128, 256, dtype=torch.float64) / 16
    basis = factorize(weight, 2, "head", outlier_channels=1, rotate=True, seed=0, dtype=dtype)
    effective = torch.einsum("hdw,hws->hsd", basis.down.double(), basis.up.double()).flatten(0, 1)
    assert basis.down.dtype == dtype
    assert (effective - weight).norm() / weight.norm() < tolerance


@pytest.mark.parametrize("weight", [torch.zeros(64, 96), torch.outer(torch.randn(64), torch.randn(96))])
def test_rank_deficient_weights_stay_finite(weight):
    basis = factorize(weight, 2, "head", outlier_channels=1, rotate=True, seed=0, dtype=torch.float32)
    x = torch.randn(5, 96)
    rebuilt = rebuild(latents_of(x, basis.down), basis.up)
    assert torch.allclose(rebuilt, x @ weight.T, atol=1e-3)


def test_quantized_latents_lose_less_than_quantized_keys_of_a_skewed_projection():
    torch.manual_seed(0)
    spectrum = torch.logspace(1, -2, 64)
    left, right = torch.linalg.qr(torch.randn(512, 64))[0], torch.linalg.qr(torch.randn(64, 64))[0]
    weight = (left * spectrum @ right.T).T
    x = torch.randn(200, 512) + 3 * left[:, 0]
    keys = x @ weight.T
    basis = factorize(weight, 1, "head", outlier_channels=1, rotate=True, seed=0, dtype=torch.float32)
    restored = dequantize(*quantize(latents_of(x, basis.down)[:, 0], 3, 64, 1))
    through_latents = (restored @ basis.up[0] - keys).norm()
    direct = (dequantize(*quantize(keys, 3, 64)) - keys).norm()
    assert through_latents < 0.6 * direct


@pytest.mark.parametrize(("kind", "smallest"), [("head", -1), ("joint", -1), ("head", -9)], ids=["gram", "joint", "qr"])
def test_plain_channels_are_the_singular_vectors_whatever_the_conditioning(kind, smallest):
    torch.manual_seed(0)
    heads, width = latent_shape(2, 16, kind)
    left = torch.linalg.qr(torch.randn(heads, 96, width, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(heads, width, width, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, smallest, width, dtype=torch.float64)
    columns = left * spectrum @ right.mT
    weight = columns.mT.reshape(32, 96)
    basis = factorize(weight, 2, kind, outlier_channels=0, rotate=False, seed=0, dtype=torch.float64)
    scale = (spectrum / spectrum.mean()).sqrt().clamp_min(0.05)
    cosines = (basis.down * left).sum(1).abs() / scale
    assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-6)
    assert torch.allclose(basis.down.mT @ basis.down, torch.diag_embed(scale**2).expand(heads, -1, -1), atol=1e-8)
