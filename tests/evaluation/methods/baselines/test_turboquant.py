"""TurboQuant: its codebooks against published ones, and its round trip against a search for the nearest level."""

import math

import pytest
import torch

from xquant_vllm.evaluation.methods.baselines.turboquant import TurboQuant, lloyd_max, turboquant_bytes

# Max, Quantizing for minimum distortion (1960), table I: positive levels and mean square error for N(0, 1).
PUBLISHED = {
    1: ([0.7980], 0.3634),
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_codebooks_are_the_published_ones(bits):
    positive, distortion = PUBLISHED[bits]
    levels = lloyd_max(bits)
    assert levels.tolist() == pytest.approx([-x for x in reversed(positive)] + positive, abs=1e-3)
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    error = (x.unsqueeze(1) - levels).square().amin(1) * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    assert torch.trapezoid(error, x).item() == pytest.approx(distortion, rel=2e-3)


def test_eight_bits_have_converged():
    levels = lloyd_max(8)
    assert len(levels) == 256
    assert (levels.diff() > 0).all()
    assert torch.allclose(levels, -levels.flip(0), atol=1e-6)


def test_a_vector_comes_back_by_its_nearest_levels():
    size, bits = 64, 3
    method = TurboQuant(bits, size, torch.device("cpu"))
    x = torch.randn(20, 3, size, generator=torch.Generator().manual_seed(0)) * 5
    rotation, levels = method._rotation.double(), lloyd_max(bits) / math.sqrt(size)
    norms = x.double().norm(dim=-1, keepdim=True)
    coordinates = x.double() @ rotation.T / norms
    nearest = levels[(coordinates.unsqueeze(-1) - levels).abs().argmin(-1)]
    expected = nearest @ rotation * norms
    (version,) = method.read(x, 2 * x)
    assert torch.allclose(version.keys.double(), expected, rtol=1e-3, atol=1e-2)
    assert torch.allclose(version.values, 2 * version.keys, rtol=1e-3, atol=1e-2)
    # The distortion of the codebook, since rotated coordinates are nearly Gaussian.
    error = (version.keys - x).square().sum() / x.square().sum()
    assert error.item() == pytest.approx(PUBLISHED[bits][1], rel=0.1)
    assert torch.allclose(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), atol=1e-6)


def test_a_vector_of_zeros_comes_back():
    assert (TurboQuant(2, 16, torch.device("cpu")).round_trip(torch.zeros(1, 1, 16)) == 0).all()


def test_bytes():
    """Three heads of 64: codes and an FP16 norm for every key and every value."""
    assert turboquant_bytes(192, 64, 3) == 2 * 3 * (64 * 3 / 8 + 2)
