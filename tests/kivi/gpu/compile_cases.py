"""Calls whose kernels are compiled: shapes of Llama-3.1-8B in BF16. Tensors have no memory, so none can be read."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from tests.kivi.kivi_cases import Spec, make_plan
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.kivi.gpu.launch import paged_attention
from xquant_vllm.kivi.gpu.store import store
from xquant_vllm.kivi.plan import KiviBatch, KiviLayerPlan

META = torch.device("meta")
_LLAMA = Spec(
    kv_heads=8, group=4, head_size=128, residual_tokens=128, block_size=128, exact_step=True, dtype=torch.bfloat16
)  # fmt: skip
SPECS = {
    "KIVI 4": _LLAMA,
    "KIVI* 2": replace(_LLAMA, bits=2, key_group_size=128, value_group_size=128, rope="neox"),
}


def _batch(lengths: list[int]) -> KiviBatch:
    """Sequences of ``lengths`` query tokens, each with 1000 cached ones."""
    sequences = len(lengths)
    of_step = AttentionBatch(
        torch.empty(sequences + 1, dtype=torch.int32, device=META),
        torch.empty(sequences, dtype=torch.int32, device=META),
        torch.empty(sequences, 128, dtype=torch.int32, device=META),
        max(lengths),
        tuple((length, length + 1000) for length in lengths) if max(lengths) > 1 else None,
    )
    return KiviBatch(of_step, torch.empty(sequences, 128, dtype=torch.int32, device=META))


def _pages(plan: KiviLayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
    quantized, residual = (torch.empty(1, of.page_bytes, dtype=torch.uint8) for of in (plan.quantized, plan.residual))
    return quantized.to(META), residual.to(META)


def _attention(spec: Spec, lengths: list[int]) -> None:
    plan = make_plan(spec)
    query = torch.empty(sum(lengths), plan.num_heads, spec.head_size, dtype=spec.dtype, device=META)
    paged_attention(query, *_pages(plan), plan, _batch(lengths), torch.empty_like(query))


def _store(spec: Spec, tokens: int) -> None:
    plan = make_plan(spec)
    slots = torch.empty(tokens, dtype=torch.int64, device=META)
    keys = torch.empty(tokens, spec.kv_heads, spec.head_size, dtype=spec.dtype, device=META)
    store(*_pages(plan), plan, _batch([1] * tokens), slots, slots, keys, keys)


def attention_call(spec: Spec, lengths: list[int]) -> Callable[[], None]:
    """Attention of sequences of ``lengths`` query tokens."""
    return partial(_attention, spec, lengths)


def store_call(spec: Spec, tokens: int) -> Callable[[], None]:
    """Storing so many tokens, of as many sequences."""
    return partial(_store, spec, tokens)


CASES: dict[str, Callable[[], None]] = {}
for _name, _spec in SPECS.items():
    CASES[f"decode {_name}"] = attention_call(_spec, [1, 1, 1, 1])
    CASES[f"prefill {_name}"] = attention_call(_spec, [256])
    CASES[f"store {_name}"] = store_call(_spec, 4)
    CASES[f"store many {_name}"] = store_call(_spec, 256)
