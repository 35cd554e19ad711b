"""A layer's attention through the pool, by vLLM's own kernels, against the reference over pages."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.attention import attention_cases
from tests.attention.attention_cases import Case, Spec, random_spec
from tests.attention.byte_case import in_bytes, on_bytes, run_reference
from tests.cpu_kernels import has_kernels
from xquant_vllm.attention import reference

if not has_kernels():
    pytest.skip("no kernels", allow_module_level=True)

from vllm.v1.kv_cache_interface import FullAttentionSpec

from xquant_vllm.plugin.hot.budget import HotMemory
from xquant_vllm.plugin.hot.cpu import HotBuilder

SUPPORTED = (64, 80, 128)


def make_case(spec: Spec) -> Case:
    """Of a key up-projection that is exact in bytes where pages are attended so."""
    case = attention_cases.make_case(spec)
    return on_bytes(case) if in_bytes(case) else case


def without_null_block(case: Case) -> Case:
    """Block 0 is vLLM's null block, which no sequence has: all blocks move up by one."""
    pages = tuple(torch.cat((torch.full_like(of[:1], 0xFF), of)) for of in case.pages)
    return replace(case, pages=pages, batch=replace(case.batch, block_table=case.batch.block_table + 1))


def builder_of(case: Case, spec: Spec, tokens: int) -> tuple[HotBuilder, SimpleNamespace]:
    impl = SimpleNamespace(
        num_heads=case.plan.num_heads,
        num_kv_heads=spec.kv_heads,
        head_size=spec.head_size,
        sliding_window=spec.window,
        earlier_layers=len(spec.earlier),
        _exact_from=spec.exact_from,
    )
    impl.set_pool = partial(setattr, impl, "hot_pool")
    kv_spec = FullAttentionSpec(
        block_size=spec.block_size, num_kv_heads=spec.kv_heads, head_size=spec.head_size, dtype=spec.dtype
    )
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=spec.dtype, max_model_len=4096))
    return HotBuilder(kv_spec, [impl], config, HotMemory(tokens, {})), impl


def step(case: Case, builder: HotBuilder, impl: SimpleNamespace) -> tuple[torch.Tensor, object]:
    """One step of the layer, padding left out as vLLM's CPU runner has none."""
    rows = case.batch.seq_lens.shape[0] - 2
    starts, lengths = case.batch.query_start_loc[: rows + 1], case.batch.seq_lens[:rows]
    counts = starts[1:] - starts[:-1]
    lengths = torch.where(counts > 0, lengths, 0)
    common = SimpleNamespace(
        query_start_loc=starts,
        seq_lens=lengths,
        block_table_tensor=case.batch.block_table[:rows],
        max_query_len=int(counts.max()),
    )
    batch = builder.build(common)
    assert builder.build(common).written is batch.written
    tokens = int(starts[-1])
    output = torch.full_like(case.query[:tokens].contiguous(), 77.0)
    query, inputs = case.query[:tokens], [x[:tokens] for x in case.inputs]
    impl.hot_pool.write(case.pages, case.plan, batch.written, None, None)
    if batch.hot is None:
        reference.paged_attention(query, case.pages, case.plan, replace(case.batch), output)
    else:
        impl.hot_pool.attend(query, case.pages, case.plan, batch, output, inputs)
    return output, batch


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    expected = expected.float()
    size = expected.square().mean(-1, keepdim=True).sqrt() + 0.1
    assert torch.isfinite(actual.float()).all()
    assert ((actual.float() - expected) / size).abs().max() <= tolerance


def fitting(seed: int) -> Spec:
    """What CPU_ATTN has kernels for; scores in the range that a model has."""
    spec = random_spec(seed)
    spec = replace(spec, head_size=SUPPORTED[seed % 3], block_size=(32, 64, 128, 16)[seed % 4], window=None)
    spec = replace(spec, value_group=16, key_group=16, rotary_size=None, hidden_size=192, strided=False)
    return replace(spec, seqs=tuple((max(length, 1), max(new, 1)) for length, new in spec.seqs))


@pytest.mark.parametrize("seed", range(40))
def test_hot(seed: int) -> None:
    spec = fitting(seed)
    print(spec)
    case = without_null_block(make_case(spec))
    builder, impl = builder_of(case, spec, 20000)
    actual, batch = step(case, builder, impl)
    assert batch.hot is not None
    expected = case.run(reference)[: actual.shape[0]]
    assert_near(actual, expected, spec.dtype)
    again, batch = step(case, builder, impl)
    assert batch.cold is None
    assert_near(again, expected, spec.dtype)


@pytest.mark.parametrize("seed", range(40, 60))
def test_some_rows_hot(seed: int) -> None:
    """The pool has room for some of the rows only."""
    spec = replace(fitting(seed), seqs=((200, 1), (90, 20), (400, 3), (60, 60)))
    case = without_null_block(make_case(spec))
    builder, impl = builder_of(case, spec, 320 + spec.block_size)
    actual, batch = step(case, builder, impl)
    assert batch.hot is not None
    assert batch.cold is not None
    assert batch.hot.tokens is not None
    hot, cold = batch.hot.tokens, batch.cold[1]
    assert sorted([*hot.tolist(), *cold.tolist()]) == list(range(actual.shape[0]))
    assert_near(actual[hot], case.run(reference)[hot], spec.dtype)
    assert_near(actual[cold], run_reference(case)[cold], spec.dtype)


@pytest.mark.parametrize("seed", range(60, 70))
def test_exact_prompts_are_attended_from_pages(seed: int) -> None:
    """Their own tokens as the model computed them; what is written to the pool comes from pages all the same."""
    spec = replace(fitting(seed), seqs=((200, 1), (90, 1)), dtype=torch.float32)
    prompts = without_null_block(make_case(replace(spec, seqs=((200, 1), (90, 20)), exact_from=2)))
    # The exact tokens' slots are poisoned in this case: their keys in the pool are read by nobody here.
    builder, impl = builder_of(prompts, replace(spec, exact_from=2), 20000)
    actual, batch = step(prompts, builder, impl)
    assert batch.cold is not None
    assert batch.cold[0].seq_lens.tolist() == [90]
    assert batch.hot is not None
    assert batch.hot.tokens is not None
    hot, cold = batch.hot.tokens, batch.cold[1]
    assert_near(actual[hot], prompts.run(reference)[hot], spec.dtype)
    assert_near(actual[cold], run_reference(prompts)[cold], spec.dtype)


@pytest.mark.parametrize(("earlier", "written"), [((), 2048), ((4,), 4000)])
def test_a_chain_is_promoted_in_one_step(earlier: tuple[int, ...], written: int) -> None:
    """Attending it from pages meanwhile would take longer."""
    spec = Spec(block_size=16, earlier=earlier)
    builder, _ = builder_of(make_case(spec), spec, 4096)
    common = SimpleNamespace(
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.tensor([4001], dtype=torch.int32),
        block_table_tensor=torch.arange(1, 252, dtype=torch.int32)[None],
        max_query_len=1,
    )
    batch = builder.build(common)
    assert batch.written.count == written + (1 if earlier else 0)
    assert (batch.hot is not None) == bool(earlier)
