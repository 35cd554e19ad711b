"""A multi-head model of full rank, made of one whose heads are repeated."""

import torch
from model_prep.perturb import noisy
from model_prep.repeat_heads import Heads


def test_repeated_heads_get_the_rank_that_they_lacked():
    heads = Heads(query=9, kv=3, size=8)
    generator = torch.Generator().manual_seed(0)
    repeated = heads.repeat(torch.randn(24, 96, generator=generator))
    assert torch.linalg.matrix_rank(repeated) == 24
    changed = noisy(repeated, 0.2, seed=1)
    assert torch.linalg.matrix_rank(changed) == 72


def test_noise_is_as_large_as_it_says_and_always_the_same():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 3
    changed = noisy(weight, 0.2, seed=5)
    assert changed.dtype == torch.bfloat16
    share = (changed.float() - weight.float()).square().mean().sqrt() / weight.float().square().mean().sqrt()
    assert 0.19 < share < 0.21
    assert torch.equal(changed, noisy(weight, 0.2, seed=5))
    assert not torch.equal(changed, noisy(weight, 0.2, seed=6))
