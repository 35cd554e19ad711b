"""Rotations are orthogonal and the same wherever they are drawn."""

import pytest
import torch

from xquant_vllm.codec.rotation import random_rotation


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
