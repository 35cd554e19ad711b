"""KIVI against its algorithm run token by token."""

import pytest
import torch

from xquant_vllm.evaluation.methods.baselines.groups import per_channel, per_token
from xquant_vllm.evaluation.methods.baselines.kivi import Kivi, KiviPreRope, kivi_bytes, recent

TOKENS, HEADS, SIZE = 70, 2, 24
KEYS, VALUES = torch.randn(2, TOKENS, HEADS, SIZE, generator=torch.Generator().manual_seed(0))


def test_keys_go_by_channel_and_values_by_token():
    (version,) = Kivi(2, 32, 0).read(KEYS, VALUES)
    assert version.seen is None
    assert torch.equal(version.keys.flatten(1), per_channel(KEYS.flatten(1), 2, 32))
    assert torch.equal(version.values.flatten(1), per_token(VALUES.flatten(1), 2, 32))
    before_rope = KiviPreRope(2, 32)
    assert torch.equal(before_rope.keys(KEYS.flatten(1)), version.keys.flatten(1))
    assert torch.equal(before_rope.values(VALUES.flatten(1)), version.values.flatten(1))


def exact_after(cached: int, residual: int) -> tuple[set[int], set[int]]:
    """Algorithm 1, decoding: the tokens whose keys, and values, are left in 16 bit once so many are cached."""
    keys: list[int] = []
    values: list[int] = []
    for token in range(cached):
        keys.append(token)
        values.append(token)
        if len(keys) == residual:
            keys = []
        if len(values) > residual:
            values.pop(0)
    return set(keys), set(values)


@pytest.mark.parametrize("residual", [1, 16, 32, 128])
def test_a_query_finds_exact_what_the_algorithm_leaves_exact(residual):
    keys, values = recent(TOKENS, residual, torch.device("cpu"))
    versions = Kivi(4, 32, residual).read(KEYS, VALUES)
    assert (torch.stack([version.seen for version in versions]).sum(0) == 1).all()
    for query in range(TOKENS):
        exact_keys, exact_values = exact_after(query + 1, residual)
        assert set(keys[query, : query + 1].nonzero().flatten().tolist()) == exact_keys
        assert set(values[query, : query + 1].nonzero().flatten().tolist()) == exact_values
        for token in range(query + 1):
            (version,) = (version for version in versions if version.seen[query, token])
            assert torch.equal(version.keys[token], KEYS[token]) == (token in exact_keys)
            assert torch.equal(version.values[token], VALUES[token]) == (token in exact_values)


@pytest.mark.parametrize(("residual", "tokens"), [(0, 1024), (128, 1024), (128, 1000), (128, 50)])
def test_bytes_are_those_of_every_token_in_the_cache(residual, tokens):
    channels, bits, group = 192, 3, 32
    exact_keys, exact_values = exact_after(tokens, residual) if residual else (set(), set())
    total = 0.0
    for token in range(tokens):
        total += channels * 2 if token in exact_keys else channels * bits / 8 + channels * 4 / group
        total += channels * 2 if token in exact_values else channels * bits / 8 + channels / group * 4
    assert kivi_bytes(channels, bits, group, residual, tokens) == pytest.approx(total / tokens)
