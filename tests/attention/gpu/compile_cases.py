"""Calls whose kernels are compiled: shapes of Llama-3.1-8B in BF16."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from tests.attention.attention_cases import Spec, make_plan
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu import launch
from xquant_vllm.attention.gpu.hot.buffers import BufferSizes, HotBuffers
from xquant_vllm.attention.gpu.hot.rows import HotRowTensors
from xquant_vllm.attention.gpu.hot.write import write_tokens
from xquant_vllm.attention.gpu.store.store import store
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.plan import AttentionLayerPlan

_LLAMA = Spec(
    kv_heads=8, group=4, head_size=128, hidden_size=4096, key_group=128, value_group=128, key_outliers=0,
    dtype=torch.bfloat16,
)  # fmt: skip
SPECS = {
    "allocated": replace(_LLAMA, allocated=1.0, seed=1),
    "uniform": _LLAMA,
    "folded": replace(_LLAMA, folded=True),
    "served": replace(_LLAMA, folded=True, key_outliers=1),
    "outliers": replace(_LLAMA, key_outliers=1, key_bits=3),
    "x": replace(_LLAMA, kind="x"),
    "x without rope": replace(_LLAMA, kind="x", rope="none", key_outliers=1),
    "deltas": replace(_LLAMA, kind="deltas", earlier=(4, 4, 4), key_bits=2),
    "chain": replace(_LLAMA, kind="chain", earlier=(4, 4, 4), joint=True, allocated=1.0, seed=2),
}


def _inputs(spec: Spec, plan: AttentionLayerPlan, tokens: int) -> list[torch.Tensor]:
    """What a layer's own streams are given."""
    return [torch.zeros(tokens, of.num_heads, of.width, dtype=spec.dtype) for of in plan.layout.streams]


def _attention(spec: Spec, lengths: list[int], decode_tokens: int = 1) -> None:
    """Sequences of ``lengths`` query tokens, each with 1000 cached ones."""
    plan = make_plan(spec)
    tokens = sum(lengths)
    pages = [torch.zeros(1, layout.page_bytes, dtype=torch.uint8) for layout in plan.layouts]
    batch = AttentionBatch(
        torch.tensor([0, *lengths]).cumsum(0).int(),
        torch.tensor(lengths).int() + 1000,
        torch.zeros(len(lengths), 128, dtype=torch.int32),
        max(lengths),
        tuple((length, length + 1000) for length in lengths),
        decode_tokens,
    )
    query = torch.zeros(tokens, plan.num_heads, spec.head_size, dtype=spec.dtype)
    launch.paged_attention(query, pages, plan, batch, torch.empty_like(query), _inputs(spec, plan, tokens))


def _store(spec: Spec, tokens: int) -> None:
    plan = make_plan(spec)
    pages = [torch.zeros(1, layout.page_bytes, dtype=torch.uint8) for layout in plan.layouts]
    store(pages, plan, torch.zeros(tokens, dtype=torch.int64), _inputs(spec, plan, tokens))


def _hot(spec: Spec, tokens: int) -> None:
    """What a step writes to a pool; of a chain once by all pages and once after the layer before."""
    plan = make_plan(spec)
    pages = [torch.zeros(1, layout.page_bytes, dtype=torch.uint8) for layout in plan.layouts]
    of_tokens = HotTokens(*(torch.zeros(tokens, dtype=torch.int64) for _ in range(3)))
    buffers = HotBuffers(BufferSizes.of([plan]), tokens, spec.dtype, plan.device)
    pool = [torch.zeros(1, spec.block_size, spec.kv_heads, spec.head_size, dtype=spec.dtype) for _ in range(2)]
    for before in (None, "layer"):
        write_tokens(pages, plan, of_tokens, buffers, *pool, layer="layer", before=before)


def _locate(rows: int) -> None:
    """Which rows are hot."""
    batch = AttentionBatch(
        torch.arange(rows + 1, dtype=torch.int32),
        torch.full((rows,), 1000, dtype=torch.int32),
        torch.zeros(rows, 64, dtype=torch.int32),
        1,
    )
    tensors = HotRowTensors(rows, 64, rows, torch.device("cpu"))
    tensors.locate(batch, torch.zeros(rows, dtype=torch.int64), torch.zeros(9, dtype=torch.int32), 16, 100, None)


def attention_call(spec: Spec, lengths: list[int], decode_tokens: int = 1) -> Callable[[], None]:
    """Attention of sequences of ``lengths`` query tokens, of which decoding ones have up to ``decode_tokens``."""
    return partial(_attention, spec, lengths, decode_tokens)


def store_call(spec: Spec, tokens: int) -> Callable[[], None]:
    """Storing so many tokens."""
    return partial(_store, spec, tokens)


def hot_call(spec: Spec, tokens: int) -> Callable[[], None]:
    """Writing so many tokens to a pool of hot blocks."""
    return partial(_hot, spec, tokens)


CASES: dict[str, Callable[[], None]] = {}
for _name, _spec in SPECS.items():
    CASES[f"decode {_name}"] = attention_call(_spec, [1, 1, 1, 1])
    if _name in ("x without rope", "served"):  # another kernel before that of attention, or in its place
        continue
    CASES[f"prefill {_name}"] = attention_call(_spec, [256])
    CASES[f"store {_name}"] = store_call(_spec, 4)
    if _name in ("uniform", "x"):
        CASES[f"prefill exact {_name}"] = attention_call(replace(_spec, exact_from=2), [256])
    CASES[f"store many {_name}"] = store_call(_spec, 256)
    CASES[f"hot {_name}"] = hot_call(_spec, 4)
    if _name in ("allocated", "x", "deltas"):
        CASES[f"hot many {_name}"] = hot_call(_spec, 256)
CASES["decode served, drafts"] = attention_call(SPECS["served"], [4, 4, 4, 4], 4)
CASES["hot rows"] = partial(_locate, 4)
