"""Tokens written to a pool by the C++ kernels against the reference, over random layers of all page formats."""

from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Case, Spec, make_case, random_spec
from tests.attention.hot.test_rematerialize import assert_close, expected, tokens_of
from tests.cpu_kernels import has_kernels
from xquant_vllm.attention.hot.pool import Pool, PoolLayout
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.latents import read_slots

if has_kernels():
    from xquant_vllm.attention.cpu import hot_write

pytestmark = pytest.mark.skipif(not has_kernels(), reason="no kernels")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def random_layout(block_size: int, head_size: int, seed: int) -> PoolLayout:
    """Some layout: tokens or channels follow each other, each in any order."""
    generator = torch.Generator().manual_seed(seed)

    def places(tokens_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, channels = torch.arange(block_size), torch.arange(head_size)
        if seed % 3 == 0:
            tokens = tokens[torch.randperm(block_size, generator=generator)]
            channels = channels[torch.randperm(head_size, generator=generator)]
        return (tokens, channels * block_size) if tokens_first else (tokens * head_size, channels)

    return PoolLayout(*places(seed % 2 == 0), *places(seed % 4 == 1))


def make_pool(case: Case, spec: Spec, tokens: HotTokens, dtype: torch.dtype) -> tuple[Pool, HotTokens]:
    """A pool of NaN, and the tokens with slots in it; keys and values share its memory as CPU_ATTN's do."""
    size, head_size = spec.block_size, case.plan.projection.head_size
    generator = torch.Generator().manual_seed(spec.seed)
    blocks = max(2, -(-tokens.count // size) + 1)
    hot_slots = torch.randperm(blocks * size, generator=generator)[: tokens.count]
    memory = torch.full((blocks, case.plan.projection.num_kv_heads, 2, size * head_size), torch.nan, dtype=dtype)
    pool = Pool(memory[:, :, 0], memory[:, :, 1], random_layout(size, head_size, spec.seed))
    return pool, replace(tokens, hot_slots=hot_slots)


def assert_written(pool: Pool, tokens: HotTokens, wanted, dtype: torch.dtype) -> None:
    assert_close(pool.get(tokens.hot_slots), wanted, dtype)
    others = torch.ones(pool.keys.shape[0] * pool.layout.block_size, dtype=torch.bool)
    others[tokens.hot_slots] = False
    assert all(torch.isnan(x.float()).all() for x in pool.get(others.nonzero().flatten()))


@pytest.mark.parametrize("seed", range(60))
def test_as_the_reference(seed: int) -> None:
    spec = random_spec(seed)
    case = make_case(spec)
    tokens = tokens_of(case, spec)
    wanted = expected(case, tokens, hot_write)
    for dtype in DTYPES:
        pool, tokens = make_pool(case, spec, tokens, dtype)
        hot_write.write(case.pages, case.plan, tokens, pool)
        assert_written(pool, tokens, wanted, dtype)
    assert tokens.carried is None


@pytest.mark.parametrize("seed", range(12))
def test_every_instruction_set(isa: str, seed: int) -> None:
    spec = random_spec(seed)
    case = make_case(spec)
    tokens = tokens_of(case, spec)
    for dtype in DTYPES:
        pool, tokens = make_pool(case, spec, tokens, dtype)
        hot_write.write(case.pages, case.plan, tokens, pool)
        assert_written(pool, tokens, expected(case, tokens, hot_write), dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["latent", "x", "deltas"])
def test_a_token_has_the_same_bits_alone_and_with_others(isa: str, kind: str, threads: int) -> None:
    """In calls of few tokens, whose heads are shared out to threads, and of many, which are shared out themselves."""
    spec = Spec(kind=kind, seqs=((200, 1),), block_size=16, head_size=64, hidden_size=192, joint=kind != "latent")
    spec = replace(spec, key_group=64, value_group=64, earlier=(4,) if kind == "deltas" else ())
    case = make_case(spec)
    tokens = tokens_of(case, spec)
    torch.set_num_threads(threads)
    for dtype in (torch.bfloat16, torch.float32):
        whole, tokens = make_pool(case, spec, tokens, dtype)
        hot_write.write(case.pages, case.plan, tokens, whole)
        parts, _ = make_pool(case, spec, tokens, dtype)
        begin = 0
        for count in (1, 2, 3, 7, 8, 9, 31, 32, 33, 200):
            some = slice(begin, begin + count)
            part = HotTokens(tokens.slots[some], tokens.positions[some], tokens.hot_slots[some])
            hot_write.write(case.pages, case.plan, part, parts)
            begin += count
        for one, other in ((whole.keys, parts.keys), (whole.values, parts.values)):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("kind", ["deltas", "chain"])
@pytest.mark.parametrize("seed", range(10))
def test_a_chain_carries_its_latents(kind: str, seed: int) -> None:
    """A layer finds what the one before has left and reads its own pages only, to the same result."""
    spec = replace(random_spec(seed), kind=kind, head_size=64, hidden_size=192, key_group=64)
    spec = replace(spec, earlier=spec.earlier or (4,), joint=True, window=None, value_group=64)
    case = make_case(spec)
    plan, dtype = case.plan, DTYPES[seed % 3]
    pool, tokens = make_pool(case, spec, tokens_of(case, spec), dtype)
    wanted = expected(case, tokens, hot_write)
    hot_write.write(case.pages, plan, tokens, pool, layer=7)
    whole = tokens.take_carried(7)
    assert_written(pool, tokens, wanted, dtype)
    tokens.carried = ("before", read_slots(case.pages, plan.layouts, plan.key_terms[:-1], tokens.slots).contiguous())
    own = [case.pages[0], *(torch.full_like(pages, 0xFF) for pages in case.pages[1:])]
    pool, tokens = make_pool(case, spec, tokens, dtype)
    tokens.carried = ("before", read_slots(case.pages, plan.layouts, plan.key_terms[:-1], tokens.slots).contiguous())
    hot_write.write(own, plan, tokens, pool, layer="this", before="before")
    assert_written(pool, tokens, wanted, dtype)
    assert tokens.carried is not None
    assert tokens.carried[0] == "this"
    torch.testing.assert_close(tokens.carried[1], whole, rtol=1e-5, atol=1e-5)


def test_wrong_input_is_refused() -> None:
    spec = Spec(kind="x", hidden_size=192, key_group=64, joint=True)
    case = make_case(spec)
    pool, tokens = make_pool(case, spec, tokens_of(case, spec), torch.bfloat16)
    largest = pool.keys.shape[0] * spec.block_size
    for name, wrong, message in (
        ("slots", -1, "slots names"),
        ("slots", 10**6, "slots names"),
        ("hot_slots", largest, "hot_slots names"),
        ("positions", 10**6, "positions names"),
    ):
        numbers = getattr(tokens, name).clone()
        numbers[-1] = wrong
        with pytest.raises(ValueError, match=message):
            hot_write.write(case.pages, case.plan, replace(tokens, **{name: numbers}), pool)
    with pytest.raises(ValueError, match="keys must be"):
        hot_write.write(case.pages, case.plan, tokens, Pool(pool.keys[:, :, 1:], pool.values, pool.layout))
    with pytest.raises(ValueError, match="values must be"):
        hot_write.write(case.pages, case.plan, tokens, Pool(pool.keys, pool.values.float(), pool.layout))
    assert torch.isnan(pool.keys.float()).all()
