"""The quantizer's error bound, its outlier channels, and its edge cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_vllm.codec.quantizer import dequantize, quantize, to_fp16


@settings(deadline=None)
@given(
    bits=st.sampled_from([8, 4, 3, 2]),
    group_size=st.sampled_from([8, 32, 64, 128]),
    groups=st.integers(1, 3),
    outliers=st.integers(0, 7),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_error_is_at_most_half_a_step(bits, group_size, groups, outliers, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, groups * group_size, generator=generator) * scale
    x[:, :outliers] *= 100
    codes, scales, zeros, kept = quantize(x, bits, group_size, outliers)
    assert codes.min() >= 0
    assert codes.max() < 2**bits
    restored = dequantize(codes, scales, zeros, kept)
    # Half a step, and the rounding of an FP16 scale (to 2**-25 where it is subnormal) over all levels and of an FP16
    # zero point.
    step, low = scales.float().unsqueeze(-1), zeros.float().abs().unsqueeze(-1)
    bound = 0.5 * step + 2**bits * torch.clamp(step * 2**-11, min=2**-25) + low * 2**-10 + 1e-7
    error = (restored - x).unflatten(-1, (groups, group_size)).abs()
    error[:, 0, :outliers] = 0
    assert (error <= bound).all()
    assert torch.equal(restored[:, :outliers], to_fp16(x[:, :outliers]).float())


def test_outliers_do_not_widen_their_group():
    x = torch.randn(4, 64)
    x[:, 0] = 1000
    _, with_outlier, _, _ = quantize(x, 4, 64, 1)
    _, without, _, _ = quantize(x, 4, 64, 0)
    assert (with_outlier * 20 < without).all()


@pytest.mark.parametrize("value", [0.0, -3.0, 7.5, 1e-9])
def test_a_constant_group_reads_back_as_its_zero_point(value):
    codes, scales, zeros, kept = quantize(torch.full((2, 64), value), 4, 64)
    assert (codes == 0).all()
    assert torch.allclose(dequantize(codes, scales, zeros, kept), torch.full((2, 64), value), atol=1e-7)


def test_values_beyond_fp16_saturate_and_stay_finite():
    x = torch.full((1, 64), 1e6)
    x[0, 1:] = -1e6
    codes, scales, zeros, kept = quantize(x, 4, 64, 1)
    assert kept.item() == 65504
    assert torch.isfinite(dequantize(codes, scales, zeros, kept)).all()


def test_nan_reaches_only_its_own_token():
    x = torch.randn(2, 64)
    x[0, 5] = torch.nan
    restored = dequantize(*quantize(x, 4, 64))
    assert restored[0].isnan().any()
    assert torch.isfinite(restored[1]).all()
