"""Bits of channels: what an allocation costs, that no bit would save more elsewhere, and what kernels need."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_vllm.codec.allocation import DISTORTION, STEP, allocate, run_bytes

LADDER = sorted(DISTORTION)


@st.composite
def all_variances(draw, widths: tuple[int, ...]) -> list[torch.Tensor]:
    """Of one to three heads, descending."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 1.0, 4.0]))
    heads = [torch.randn(draw(st.sampled_from(widths)), generator=generator) for _ in range(draw(st.integers(1, 3)))]
    return [(head * spread).exp().sort(descending=True).values for head in heads]


@settings(deadline=None)
@given(variances=all_variances((8, 20, 64, 256, 272, 528)), bits=st.floats(0, 9))
def test_runs_keep_the_budget_and_fit_the_kernels(variances, bits):
    channels = sum(v.numel() for v in variances)
    budget = int(channels * bits / 8)
    allocated = allocate(variances, budget)
    spent = sum(map(run_bytes, allocated))
    assert spent <= budget
    # All of it but for what a last step of a unit, and an even number of threes in every head, may leave.
    assert spent == channels or 8 * (budget - spent) < 2 * 16 + 4 * len(variances) + 8
    for v, runs in zip(variances, allocated, strict=True):
        unit = 4 if v.numel() <= 256 else 16
        assert [b for b, _ in runs] == sorted((b for b, _ in runs), reverse=True)
        assert sum(count for _, count in runs) <= v.numel()
        for b, count in runs:
            assert 0 < count <= 256
            assert count % (8 if b == 3 else unit) == 0
            assert b * count % 8 == 0


def _units(runs: tuple[tuple[int, int], ...], width: int) -> list[int]:
    bits = [b for b, count in runs for _ in range(count // 16)]
    return bits + [0] * (width // 16 - len(bits))


@settings(deadline=None)
@given(variances=all_variances((272, 320)), bits=st.floats(0.2, 7.5))
def test_no_bit_would_save_more_elsewhere(variances, bits):
    """Every step up the ladder that was taken saves at least as much per bit as any that was not and cost no more."""
    allocated = allocate(variances, int(sum(v.numel() for v in variances) * bits / 8))
    taken, refused = [], []
    for v, runs in zip(variances, allocated, strict=True):
        means = v.double().unflatten(0, (-1, 16)).mean(1).tolist()
        for mean, of_unit in zip(means, _units(runs, v.numel()), strict=True):
            for low, high in pairwise(LADDER):
                saved = mean * (DISTORTION[low] - DISTORTION[high]) / (high - low)
                (taken if high <= of_unit else refused).append((saved, high - low))
    for cost in (1, 2):
        least = min((saved for saved, of_step in taken if of_step >= cost), default=float("inf"))
        most = max((saved for saved, of_step in refused if of_step == cost), default=0.0)
        assert least >= most


@pytest.mark.parametrize("bits", STEP)
def test_the_tables_are_those_of_a_gaussian_channel(bits):
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)

    def distortion(step: float) -> float:
        middle = (2**bits - 1) / 2
        codes = (x / step + middle).round().clamp(0, 2**bits - 1)
        return ((x - (codes - middle) * step).square() @ density / density.sum()).item()

    assert distortion(STEP[bits]) == pytest.approx(DISTORTION[bits], rel=0.015)  # at 8 bits 1.2% off, else 0.1%
    for other in (0.97, 1.03):
        assert distortion(STEP[bits]) < distortion(STEP[bits] * other)
