"""Rotations are orthogonal and the same wherever they are drawn."""

import pytest
import torch

from xquant_vllm.codec.rotation import hadamard_rotation, random_rotation


@pytest.mark.parametrize("size", [1, 2, 63, 64, 192])
def test_orthogonal(size):
    rotation = random_rotation(size, seed=3)
    assert torch.allclose(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_fixed_by_its_seed_whatever_the_default_dtype():
    first = random_rotation(31, seed=5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        second = random_rotation(31, seed=5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first, second)
    assert not torch.equal(first, random_rotation(31, seed=6))


@pytest.mark.parametrize("size", [1, 8, 24, 64, 72, 576, 1024])
def test_the_fast_rotation_is_orthogonal_and_spreads_an_outlier(size):
    rotation = hadamard_rotation(size, seed=3)
    matrix = rotation.apply(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-6)
    # One large channel becomes many of about the same size.
    assert matrix.abs().max() <= 1 if size == 1 else matrix.abs().max() <= (size / rotation.block) ** 0.5 / size**0.5
    assert torch.equal(hadamard_rotation(size, seed=3).signs, rotation.signs)
    assert torch.allclose(rotation.invert(matrix), torch.eye(size, dtype=torch.float64), atol=1e-6)


def test_the_fast_rotation_of_a_block_is_sylvesters_matrix():
    rotation = hadamard_rotation(4, seed=0)
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.allclose(rotation.apply(torch.eye(4)), rotation.signs[:, None] * expected * rotation.mix.sign())
