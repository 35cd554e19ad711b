"""One tiny attention by the kernels that a server would use, against the PyTorch reference on the CPU.

A layer with latents per head at 4 bits, the default, made from random weights; of two sequences one decodes and one is
a prompt.
"""

from dataclasses import replace
from typing import Any

import torch

from xquant_vllm.attention import reference
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.latents import read_slots
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.layout import PageLayout
from xquant_vllm.projection.layer import factorize_layer
from xquant_vllm.projection.rematerialize import LayerProjection
from xquant_vllm.projection.rope import RotaryTable
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.layer_weights import spec_of
from xquant_vllm.scheme.settings import XQuantSettings

_HIDDEN, _KV_HEADS, _HEADS, _HEAD_SIZE, _BLOCK_SIZE = 512, 2, 8, 64, 16
# Query tokens and cached tokens.
_SEQUENCES = ((1, 150), (40, 40))
_PHASES = ("decode", "prefill")

BOUNDS = {
    ("cpu", torch.float32): 5e-3,
    ("cpu", torch.bfloat16): 3e-2,
    ("cuda", torch.float32): 5e-3,
    ("cuda", torch.bfloat16): 8e-2,
}
"""Largest error allowed, relative to the largest channel of a head, by device and dtype of the queries. C++ kernels for
VNNI and AMX round the weights of keys to 8 bits; a kernel that is wrong is off by about 1."""
STORE_BOUND = 1e-2
"""How much larger, relatively, the quantization error of stored latents may be than the reference's."""


def check_attention(kernels: Any, device_type: str) -> list[dict[str, Any]]:
    """Store and attend.

    Args:
        kernels: an implementation (see :class:`xquant_vllm.attention.dispatch.AttentionKernels`).
        device_type: ``"cpu"`` or ``"cuda"``: where its tensors are.

    Returns:
        For every comparison ``operation``, ``dtype``, ``error``, ``bound`` and ``passed``.
    """
    device = torch.device(device_type)
    plan, latents, queries = _layer()
    there = _plan_on(plan, device)
    batch, slots = _batch()
    blocks = 1 + sum(-(-length // _BLOCK_SIZE) for _, length in _SEQUENCES)
    pages = torch.zeros(blocks, plan.layout.page_bytes, dtype=torch.uint8)
    expected_pages = pages.clone()
    stored = pages.to(device)
    kernels.store((stored,), there, slots.to(device), [x.to(device) for x in latents])
    reference.store((expected_pages,), plan, slots, latents)
    results = [_compare_stored(stored.cpu(), expected_pages, plan, slots, latents)]
    for dtype in (torch.float32, torch.bfloat16):
        query = queries.to(dtype)
        expected = torch.empty_like(queries)
        reference.paged_attention(query.float(), (stored.cpu(),), plan, batch, expected)
        output = torch.full_like(query, torch.nan, device=device)
        kernels.paged_attention(query.to(device), (stored,), there, _batch_on(batch, device), output)
        results += _compare(output.cpu().float(), expected, dtype, device_type)
    return results


def _layer() -> tuple[AttentionLayerPlan, list[torch.Tensor], torch.Tensor]:
    """A plan, what is stored of the tokens of all sequences, and queries."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    settings = XQuantSettings()
    key, value = (normal(_KV_HEADS * _HEAD_SIZE, _HIDDEN) / _HIDDEN**0.5 for _ in range(2))
    (form,) = layer_formats(settings, [LayerShape(0, _HIDDEN, _KV_HEADS, _HEAD_SIZE)])
    bases = factorize_layer(key, value, _KV_HEADS, spec_of(settings, torch.float32))
    longest = max(length for _, length in _SEQUENCES)
    angles = torch.arange(longest)[:, None] * 10000.0 ** (-torch.arange(0, _HEAD_SIZE, 2) / _HEAD_SIZE)
    projection = LayerProjection(bases[0].up, bases[1].up, rope=RotaryTable(angles.cos(), angles.sin()))
    plan = AttentionLayerPlan(
        (PageLayout(form.streams, _BLOCK_SIZE),), projection, num_heads=_HEADS, scale=_HEAD_SIZE**-0.5
    )
    inputs = normal(sum(length for _, length in _SEQUENCES), _HIDDEN)
    latents = [torch.einsum("th,bhw->tbw", inputs, basis.down).flatten(1) for basis in bases]
    return plan, latents, normal(sum(new for new, _ in _SEQUENCES), _HEADS, _HEAD_SIZE)


def _batch() -> tuple[AttentionBatch, torch.Tensor]:
    """The sequences, and the slots of all their tokens."""
    starts = torch.tensor([0, *(new for new, _ in _SEQUENCES)]).cumsum(0).int()
    lengths = torch.tensor([length for _, length in _SEQUENCES], dtype=torch.int32)
    blocks = [-(-length // _BLOCK_SIZE) for _, length in _SEQUENCES]
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    slots, first = [], 1
    for row, (count, (_, length)) in enumerate(zip(blocks, _SEQUENCES, strict=True)):
        table[row, :count] = torch.arange(first, first + count)
        slots.append(first * _BLOCK_SIZE + torch.arange(length))
        first += count
    longest = max(new for new, _ in _SEQUENCES)
    return AttentionBatch(starts, lengths, table, max_query_len=longest, lengths=_SEQUENCES), torch.cat(slots)


def _batch_on(batch: AttentionBatch, device: torch.device) -> AttentionBatch:
    return replace(
        batch,
        query_start_loc=batch.query_start_loc.to(device),
        seq_lens=batch.seq_lens.to(device),
        block_table=batch.block_table.to(device),
    )


def _plan_on(plan: AttentionLayerPlan, device: torch.device) -> AttentionLayerPlan:
    projection = plan.projection
    assert projection.rope is not None
    assert projection.up_value is not None
    rope = replace(projection.rope, cos=projection.rope.cos.to(device), sin=projection.rope.sin.to(device))
    moved = replace(projection, up_key=projection.up_key.to(device), up_value=projection.up_value.to(device), rope=rope)
    return replace(plan, projection=moved)


def _compare_stored(
    actual: torch.Tensor, expected: torch.Tensor, plan: AttentionLayerPlan, slots: torch.Tensor, latents: Any
) -> dict[str, Any]:
    """By how much the quantization error is larger than the reference's."""
    worst = 0.0
    for terms, x in zip((plan.key_terms, plan.value_terms), latents, strict=True):
        errors = []
        for pages in (actual, expected):
            read = read_slots((pages,), plan.layouts, terms, slots).flatten(1)
            errors.append(float((read - x).norm()))
        worst = max(worst, errors[0] / errors[1] - 1)
    return _result("store", "float32", worst, STORE_BOUND)


def _compare(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, device_type: str
) -> list[dict[str, Any]]:
    """Of every phase the largest error relative to a head's largest channel."""
    results, begin = [], 0
    for phase, (new, _) in zip(_PHASES, _SEQUENCES, strict=True):
        rows = slice(begin, begin + new)
        begin += new
        off = (actual[rows] - expected[rows]).abs().amax(-1) / expected[rows].abs().amax(-1)
        name = str(dtype).removeprefix("torch.")
        results.append(_result(phase, name, float(off.nan_to_num(torch.inf).max()), BOUNDS[device_type, dtype]))
    return results


def _result(operation: str, dtype: str, error: float, bound: float) -> dict[str, Any]:
    # JSON has no infinity.
    told = error if error < 1e30 else None
    return {"operation": operation, "dtype": dtype, "error": told, "bound": bound, "passed": error <= bound}
