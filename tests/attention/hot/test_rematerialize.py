"""Keys and values of single tokens against those of the reference, over random layers of all page formats."""

from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Case, Spec, make_case, random_spec
from tests.cpu_kernels import has_kernels
from xquant_vllm.attention.hot import reference
from xquant_vllm.attention.hot.rematerialize import rematerialize
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.latents import read_slots
from xquant_vllm.projection.rematerialize import rematerialize_keys, rematerialize_values

KERNELS = [reference]
if has_kernels():
    from xquant_vllm.attention.cpu import hot_tokens

    KERNELS.append(hot_tokens)


def tokens_of(case: Case, spec: Spec) -> HotTokens:
    """All tokens that the pages hold, in runs and alone."""
    slots, positions = [], []
    for row, (length, new) in enumerate(spec.seqs):
        if not new:
            continue
        oldest = max(0, length - new - spec.window + 1) if spec.window else 0
        for position in range(oldest, length):
            block = int(case.batch.block_table[row, position // spec.block_size])
            slots.append(block * spec.block_size + position % spec.block_size)
            positions.append(position)
    order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(spec.seed))
    order[: len(slots) // 2] = order[: len(slots) // 2].sort().values
    slots, positions = torch.tensor(slots, dtype=torch.int64)[order], torch.tensor(positions, dtype=torch.int64)[order]
    return HotTokens(slots, positions, slots)


def expected(case: Case, tokens: HotTokens, kernels) -> tuple[torch.Tensor, torch.Tensor]:
    plan = case.plan
    projection = plan.projection
    if kernels is not reference and projection.rope is None and projection.key_norm is None:
        # The C++ kernels leave out a bias that moves all scores alike.
        case = replace(case, plan=replace(plan, projection=replace(projection, key_bias=None)))
        plan = plan if plan.key_bias_matters else case.plan
    keys = rematerialize_keys(
        read_slots(case.pages, plan.layouts, plan.key_terms, tokens.slots), tokens.positions, plan.projection
    )
    values = rematerialize_values(read_slots(case.pages, plan.layouts, plan.value_terms, tokens.slots), plan.projection)
    return keys, values


def assert_close(actual, wanted, dtype) -> None:
    """Within the rounding of inputs, matrix and result to the dtype, of the size of a key as it was multiplied."""
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for x, y in zip(actual, wanted, strict=True):
        assert x.dtype == dtype
        assert torch.isfinite(x.float()).all()
        size = y.square().mean((1, 2), keepdim=True).sqrt() + 1
        worst = torch.cat((((x.float() - y) / size).abs().flatten(), torch.zeros(1))).max()
        assert worst <= tolerance


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("seed", range(60))
def test_as_the_reference(kernels, seed: int) -> None:
    spec = random_spec(seed)
    case = make_case(spec)
    tokens = tokens_of(case, spec)
    wanted = expected(case, tokens, kernels)
    assert_close(rematerialize(kernels, case.pages, case.plan, tokens, torch.float32), wanted, torch.float32)
    assert_close(rematerialize(kernels, case.pages, case.plan, tokens, spec.dtype), wanted, spec.dtype)
    assert tokens.carried is None


@pytest.mark.skipif(len(KERNELS) < 2, reason="no kernels")
@pytest.mark.parametrize("seed", range(12))
def test_every_instruction_set(isa: str, seed: int) -> None:
    spec = random_spec(seed)
    case = make_case(spec)
    tokens = tokens_of(case, spec)
    actual = rematerialize(hot_tokens, case.pages, case.plan, tokens, torch.float32)
    assert_close(actual, expected(case, tokens, hot_tokens), torch.float32)


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("kind", ["deltas", "chain"])
@pytest.mark.parametrize("seed", range(10))
def test_a_chain_carries_its_latents(kernels, kind: str, seed: int) -> None:
    """A layer finds what the one before has left and reads its own pages only, to the same result."""
    spec = replace(random_spec(seed), kind=kind, head_size=64, hidden_size=192, key_group=64, dtype=torch.float32)
    spec = replace(spec, earlier=spec.earlier or (4,), joint=True, window=None, value_group=64)
    case = make_case(spec)
    plan, tokens = case.plan, tokens_of(case, spec)
    wanted = rematerialize(kernels, case.pages, plan, tokens, torch.float32, layer=7)
    whole = tokens.take_carried(7)
    assert tokens.take_carried(7) is None
    before = plan.key_terms[:-1]
    tokens.carried = ("before", read_slots(case.pages, plan.layouts, before, tokens.slots).contiguous())
    own = [case.pages[0], *(torch.full_like(pages, 0xFF) for pages in case.pages[1:])]
    actual = rematerialize(kernels, own, plan, tokens, torch.float32, layer="this", before="before")
    for x, y in zip(actual, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert tokens.carried[0] == "this"
    torch.testing.assert_close(tokens.carried[1], whole, rtol=1e-5, atol=1e-5)


def test_what_another_layer_has_left_is_not_taken() -> None:
    spec = Spec(kind="deltas", earlier=(4, 2), hidden_size=192, key_group=64, joint=True)
    case = make_case(spec)
    tokens = tokens_of(case, spec)
    wanted = rematerialize(reference, case.pages, case.plan, tokens, torch.float32)
    tokens.carried = ("another", torch.full((tokens.count, 1, 192), torch.nan))
    actual = rematerialize(reference, case.pages, case.plan, tokens, torch.float32, before="before")
    assert all(torch.equal(x, y) for x, y in zip(actual, wanted, strict=True))
