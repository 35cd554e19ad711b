"""What the kernels write to the pool, under Triton's interpreter, against the reference."""

from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Case, Spec, make_case, random_spec
from tests.attention.gpu.test_paged_attention import short
from tests.attention.hot.test_rematerialize import tokens_of
from xquant_vllm.attention.gpu.gpu_plan import prepare
from xquant_vllm.attention.gpu.hot.buffers import BufferSizes, HotBuffers
from xquant_vllm.attention.gpu.hot.write import prepare_hot, write_tokens
from xquant_vllm.attention.hot import reference
from xquant_vllm.attention.hot.rematerialize import rematerialize
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.latents import read_slots

HOT_BLOCKS, BLOCK = 40, 16
NAN = float("nan")


def some_tokens(case: Case, spec: Spec, most: int = 24) -> HotTokens:
    """Some of the tokens that the pages hold, at random places of the pool; every third one has none."""
    every = tokens_of(case, spec)
    count = min(most, every.count)
    places = torch.randperm(HOT_BLOCKS * BLOCK, generator=torch.Generator().manual_seed(spec.seed))[:count]
    places[2::3] = -1
    slots = every.slots[:count].clone()
    slots[2::3] = -1  # nothing is read there
    return HotTokens(slots, every.positions[:count].clone(), places)


def buffers_of(case: Case, dtype: torch.dtype, tokens: int) -> HotBuffers:
    """Every byte of them is NaN."""
    buffers = HotBuffers(BufferSizes.of([case.plan]), tokens, dtype, torch.device("cpu"))
    for buffer in (buffers._latents, buffers._rounded, buffers._projected):
        buffer.fill_(NAN)
    return buffers


def pool_of(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    projection = case.plan.projection
    shape = (HOT_BLOCKS, BLOCK, projection.num_kv_heads, projection.head_size)
    return [torch.full(shape, NAN, dtype=dtype) for _ in range(2)]


def without_unseen_bias(case: Case) -> Case:
    """The kernels leave out a bias that moves all scores alike."""
    projection = case.plan.projection
    if prepare(case.plan, torch.float32).has_key_bias or projection.key_bias is None:
        return case
    return replace(case, plan=replace(case.plan, projection=replace(projection, key_bias=None)))


def assert_written(pool, wanted, tokens: HotTokens, dtype: torch.dtype) -> None:
    """What has a place is there, of the size of a key as it was multiplied; everything else is as it was."""
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    placed = tokens.hot_slots >= 0
    for of_pool, y in zip(pool, wanted, strict=True):
        flat, y = of_pool.flatten(0, 1), y[placed].float()
        x = flat[tokens.hot_slots[placed]].float()
        assert torch.isfinite(x).all()
        size = y.square().mean((1, 2), keepdim=True).sqrt() + 1
        assert ((x - y) / size).abs().max() <= tolerance
        untouched = torch.ones(flat.shape[0], dtype=torch.bool)
        untouched[tokens.hot_slots[placed]] = False
        assert flat[untouched].isnan().all()


def reference_of(case: Case, tokens: HotTokens) -> tuple[torch.Tensor, torch.Tensor]:
    some = torch.where(tokens.slots >= 0, tokens.slots, tokens.slots.max())
    readable = HotTokens(some, tokens.positions, tokens.hot_slots)
    return rematerialize(reference, case.pages, without_unseen_bias(case).plan, readable, torch.float32)


# The others are long sequences of wide heads, or alike.
QUICK = (0, 1, 2, 3, 5, 6, 8, 9, 10, 12)


@pytest.mark.parametrize("seed", [s if s in QUICK else pytest.param(s, marks=pytest.mark.nightly) for s in range(24)])
def test_as_the_reference(seed: int) -> None:
    spec = short(random_spec(seed))
    print(spec)
    case = make_case(spec)
    tokens = some_tokens(case, spec)
    if not tokens.count:
        return
    pool = pool_of(case, spec.dtype)
    prepare_hot(case.plan, spec.dtype)
    write_tokens(case.pages, case.plan, tokens, buffers_of(case, spec.dtype, 30), *pool)
    assert_written(pool, reference_of(case, tokens), tokens, spec.dtype)


def test_many_tokens() -> None:
    """So many that a program has several."""
    spec = Spec(seqs=((300, 1),), kv_heads=1, joint=True, head_size=16, key_group=16, value_group=16, bias=True)
    case = make_case(spec)
    tokens, pool = some_tokens(case, spec, 300), pool_of(case, torch.float32)
    write_tokens(case.pages, case.plan, tokens, buffers_of(case, torch.float32, 300), *pool)
    assert_written(pool, reference_of(case, tokens), tokens, torch.float32)


@pytest.mark.parametrize("kind", ["deltas", "chain"])
@pytest.mark.parametrize("seed", range(6))
def test_a_chain_carries_its_latents(kind: str, seed: int) -> None:
    """A layer finds what the one before has left in the buffers and reads its own pages only."""
    spec = replace(random_spec(seed), kind=kind, head_size=32, hidden_size=64, key_group=32, dtype=torch.float32)
    spec = replace(spec, earlier=spec.earlier or (4,), joint=True, window=None, value_group=32)
    spec = replace(spec, seqs=((30, 2),))
    case = make_case(spec)
    plan, tokens = case.plan, some_tokens(case, spec)
    buffers, pool = buffers_of(case, torch.float32, 30), pool_of(case, torch.float32)
    placed = tokens.hot_slots >= 0
    terms = plan.key_terms[:-1]
    left = read_slots(case.pages, plan.layouts, terms, tokens.slots[placed]).transpose(0, 1)
    for buffer in buffers.latents(left.shape[0], tokens.count, left.shape[2]):
        buffer[:, placed] = left
    buffers.left = tokens, "before"
    own = [case.pages[0], *(torch.full_like(pages, 0xFF) for pages in case.pages[1:])]
    write_tokens(own, plan, tokens, buffers, *pool, layer="this", before="before")
    assert_written(pool, reference_of(case, tokens), tokens, torch.float32)
    assert buffers.left == (tokens, "this")
    whole = read_slots(case.pages, plan.layouts, plan.key_terms, tokens.slots[placed]).transpose(0, 1)
    latents, _ = buffers.latents(whole.shape[0], tokens.count, whole.shape[2])
    torch.testing.assert_close(latents[:, placed], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "left_by",
    [lambda tokens: (tokens, "another"), lambda tokens: (replace(tokens), "before"), lambda tokens: None],
    ids=["another layer", "another step", "nobody"],
)
def test_what_others_have_left_is_not_taken(left_by) -> None:
    spec = Spec(kind="deltas", earlier=(4, 2), hidden_size=64, key_group=32, joint=True, seqs=((20, 1),))
    case = make_case(spec)
    tokens, pool = some_tokens(case, spec), pool_of(case, torch.float32)
    buffers = buffers_of(case, torch.float32, 30)
    buffers.left = left_by(tokens)
    write_tokens(case.pages, case.plan, tokens, buffers, *pool, layer="this", before="before")
    assert_written(pool, reference_of(case, tokens), tokens, torch.float32)
