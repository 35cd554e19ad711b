"""Symmetric quantization with one scale per token, against every level of every channel tried one by one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_vllm.codec.allocated import CANDIDATES, dequantize_allocated, quantize_allocated
from xquant_vllm.codec.allocation import DISTORTION, STEP, Runs

RUNS = (((8, 4), (6, 8), (4, 4), (3, 8), (2, 4)), ((4, 20),), ((2, 12),), ((6, 4), (2, 8)))


def channels_of(runs: Runs) -> list[int]:
    return [bits for bits, count in runs for _ in range(count)]


def nearest(x: float, bits: int, scale: float) -> float:
    """The level of a channel that is nearest to ``x``."""
    levels = [(code - (2**bits - 1) / 2) * STEP[bits] * scale for code in range(2**bits)]
    return min(levels, key=lambda level: abs(level - x))


def error(token: list[float], runs: Runs, scale: float) -> float:
    bits = channels_of(runs)
    return sum((x - nearest(x, b, scale)) ** 2 / DISTORTION[b] for x, b in zip(token, bits, strict=True))


def matching(token: list[float], runs: Runs) -> int:
    """The scale's code that makes the root mean square, weighted by worth, that of a Gaussian channel."""
    worth = [1 / DISTORTION[b] for b in channels_of(runs)]
    square = sum(w * x * x for w, x in zip(worth, token, strict=True)) / sum(worth)
    return round(8 * math.log2(math.sqrt(square))) + 128


@settings(deadline=None, max_examples=60)
@given(runs=st.sampled_from(RUNS), seed=st.integers(0, 2**31), size=st.sampled_from([0.02, 1.0, 300.0]))
def test_takes_the_best_of_the_candidates_and_the_nearest_levels(runs, seed, size):
    generator = torch.Generator().manual_seed(seed)
    stored = len(channels_of(runs))
    token = torch.randn(stored + 4, generator=generator) * size
    if seed % 3 == 0:
        token[:2] *= 6  # which a small scale clips
    codes, scale = quantize_allocated(token, runs)
    assert codes.shape == (stored,)
    numbers = token[:stored].tolist()
    middle = matching(numbers, runs)
    errors = {middle + c: error(numbers, runs, 2 ** ((middle + c - 128) / 8)) for c in CANDIDATES}
    assert scale.item() in errors
    assert errors[scale.item()] <= min(errors.values()) * (1 + 1e-5)

    read = dequantize_allocated(codes, scale, runs, stored + 4)
    assert (read[stored:] == 0).all()
    value = 2 ** ((scale.item() - 128) / 8)
    for x, b, got in zip(numbers, channels_of(runs), read.tolist(), strict=False):
        level = nearest(x, b, value)
        assert got == pytest.approx(level, rel=1e-6) or abs(abs(x - got) - abs(x - level)) < 1e-5 * STEP[b] * value


@pytest.mark.parametrize("exponent", [-40, -16, 15, 40])
def test_scales_end_where_eight_bits_do(exponent):
    x = torch.randn(3, 20) * 2.0**exponent
    codes, scales = quantize_allocated(x, ((4, 20),))
    read = dequantize_allocated(codes, scales, ((4, 20),), 20)
    assert read.isfinite().all()
    assert (scales >= 1).all()
    if exponent == 40:
        assert (scales == 255).all()
        assert (read.sign() == x.sign()).all()
    if exponent == -40:
        assert (scales == 1).all()


def test_what_is_no_number_counts_as_zero_and_stays_in_its_token():
    x = torch.randn(3, 12)
    clean = x.clone()
    x[1, 3], clean[1, 3] = torch.nan, 0.0
    for got, expected in zip(quantize_allocated(x, ((2, 12),)), quantize_allocated(clean, ((2, 12),)), strict=True):
        assert torch.equal(got, expected)
    x[1, 4], x[2, 5] = torch.inf, -torch.inf
    codes, scales = quantize_allocated(x, ((2, 12),))
    assert dequantize_allocated(codes, scales, ((2, 12),), 12).isfinite().all()
    assert torch.equal(codes[0], quantize_allocated(clean, ((2, 12),))[0][0])


def test_zeros_read_back_as_nearly_nothing():
    codes, scales = quantize_allocated(torch.zeros(2, 20), ((6, 8), (3, 8)))
    assert (dequantize_allocated(codes, scales, ((6, 8), (3, 8)), 20).abs() < 1e-4).all()
