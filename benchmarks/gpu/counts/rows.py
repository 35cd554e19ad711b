"""Layers whose kernels are counted, and calls that launch these as serving would."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu import kivi, layers
from benchmarks.gpu.cases import Spec, make_plan
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.gpu_plan import prepare
from xquant_vllm.attention.gpu.launch import paged_attention
from xquant_vllm.attention.gpu.store.store import store
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.layout import StreamFormat
from xquant_vllm.kivi.gpu.launch import paged_attention as kivi_attention
from xquant_vllm.kivi.plan import KiviBatch
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.settings import XQuantSettings

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 4096, 32, 8, 128
"""Llama-3.1-8B."""

_CONTEXT = 1000


@dataclass(frozen=True)
class Row:
    """One kernel to count.

    Attributes:
        name: what the table calls it.
        launch: calls the host function; nothing that it computes is read.
        number_bytes: bytes of one cached token, all kv heads together, that memory must deliver.
        rounds: of loops inside the loop over tokens, in the order of the program.
        kernel: the kernel of those launched; None: the only one that loops over cached tokens.
        capability: what is compiled for.
        head_size: channels of a head.
    """

    name: str
    launch: Callable[[], None]
    number_bytes: int
    rounds: tuple[int, ...] = ()
    kernel: str | None = None
    capability: int = 90
    head_size: int = HEAD_SIZE


def served_spec(head_size: int = HEAD_SIZE, **settings: Any) -> Spec:
    """A layer of Llama-3.1-8B's shape as served with these settings, by default with none."""
    parsed = XQuantSettings.model_validate(settings)
    (form,) = layer_formats(parsed, [LayerShape(0, HIDDEN, KV_HEADS, head_size)])
    key, value = form.streams
    assert isinstance(key, StreamFormat)
    assert isinstance(value, StreamFormat)
    return Spec(
        kv_heads=KV_HEADS, group=HEADS // KV_HEADS, head_size=head_size, hidden_size=HIDDEN, dtype=torch.bfloat16,
        key_bits=key.bits, key_group=key.group_size, key_outliers=key.outlier_channels,
        value_bits=value.bits, value_group=value.group_size, value_outliers=value.outlier_channels,
        folded=parsed.fold_values,
    )  # fmt: skip


def attend(plan: AttentionLayerPlan, lengths: Sequence[int], decode_tokens: int = 1) -> None:
    """Sequences of ``lengths`` query tokens, each with as many cached ones before; in BF16."""
    tokens = sum(lengths)
    pages = [torch.zeros(1, layout.page_bytes, dtype=torch.uint8) for layout in plan.layouts]
    batch = AttentionBatch(
        torch.tensor([0, *lengths]).cumsum(0).int(),
        torch.tensor(lengths).int() + _CONTEXT,
        torch.zeros(len(lengths), 128, dtype=torch.int32),
        max(lengths),
        None if max(lengths) == 1 else tuple((length, length + _CONTEXT) for length in lengths),
        decode_tokens,
    )
    query = torch.zeros(tokens, plan.num_heads, plan.projection.head_size, dtype=torch.bfloat16)
    inputs = [torch.zeros(tokens, of.num_heads, of.width, dtype=torch.bfloat16) for of in plan.layout.streams]
    paged_attention(query, pages, plan, batch, torch.empty_like(query), inputs)


def store_served(tokens: int) -> None:
    """Store so many tokens with the served default."""
    plan = make_plan(served_spec())
    pages = [torch.zeros(1, layout.page_bytes, dtype=torch.uint8) for layout in plan.layouts]
    inputs = [torch.zeros(tokens, of.num_heads, of.width, dtype=torch.bfloat16) for of in plan.layout.streams]
    store(pages, plan, torch.zeros(tokens, dtype=torch.int64), inputs)


def _read(plan: AttentionLayerPlan) -> int:
    return sum(layout.bytes_per_token for layout in plan.layouts)


def _bands(plan: AttentionLayerPlan) -> tuple[int, ...]:
    """Bands of a kv head's keys and of its values, as far as kernels loop over them."""
    gpu_plan = prepare(plan, torch.bfloat16)
    looped = [gpu_plan.key]
    if not (gpu_plan.absorb_value or gpu_plan.shared):
        looped.append(gpu_plan.value)
    return tuple(int(latent.first_band[1] - latent.first_band[0]) for latent in looped)


def _kivi(bits: int) -> Row:
    plan = kivi.make_plan(bits, HEADS, KV_HEADS, HEAD_SIZE, torch.bfloat16)

    def launch() -> None:
        meta = torch.device("meta")
        numbers = [torch.empty(shape, dtype=torch.int32, device=meta) for shape in ((5,), (4,), (4, 128), (4, 128))]
        batch = KiviBatch(AttentionBatch(*numbers[:3], 1, None), numbers[3])
        pages = [
            torch.empty(1, of.page_bytes, dtype=torch.uint8, device=meta) for of in (plan.quantized, plan.residual)
        ]
        query = torch.empty(4, HEADS, HEAD_SIZE, dtype=torch.bfloat16, device=meta)
        kivi_attention(query, *pages, plan, batch, torch.empty_like(query))

    return Row(f"KIVI, {bits} bits", launch, plan.quantized.page_bytes // plan.quantized.block_size)


def _layer(name: str) -> AttentionLayerPlan:
    return layers.make_layer(layers.LLAMA_3, name, 128, 16, torch.device("cpu"), 0)


def _row(name: str, plan: AttentionLayerPlan, lengths: Sequence[int] = (1,) * 4, drafts: int = 0, **more: Any) -> Row:
    return Row(name, lambda: attend(plan, lengths, 1 + drafts), _read(plan), _bands(plan), **more)


def served() -> Row:
    """Decoding with the served default."""
    return _row("per head, 4 bits: the served default", make_plan(served_spec()))


def other_heads() -> dict[str, Row]:
    """Decoding from other latents per head, by the names that they have in JSON: bits, norms, drafted tokens."""
    return {
        **{f"uniform_{n}": _row(f"per head, {n} bits", make_plan(served_spec(bits=n))) for n in (2, 3, 8)},
        **{f"calibrated_{n}": _row(f"per head, calibrated {n} bits", _layer(f"allocated {n}")) for n in (2, 3, 4)},
        "norm": _row("per head, 4 bits, keys with a norm", make_plan(replace(served_spec(), norm=True))),
        "drafts": _row("per head, 4 bits, four query tokens", make_plan(served_spec()), (4,) * 4, drafts=3),
    }


def others() -> list[Row]:
    """Everything else that the table has."""
    default = make_plan(served_spec())
    chunk = ((256,), {"kernel": "rematerialize_pages"})
    return [
        *(
            _row(f"per head, 4 bits, heads of {size}", make_plan(served_spec(size)), head_size=size)
            for size in (64, 256)
        ),
        _row("joint, calibrated 4 bits", _layer("joint allocated 4")),
        _row("X, 4 bits", make_plan(replace(served_spec(), kind="x", key_group=128, key_outliers=0))),
        *map(_kivi, (4, 2)),
        _row("prefill, per head, 4 bits: pages to keys and values", default, chunk[0], **chunk[1]),
        _row("per head, 4 bits, sm_80", default, capability=80),
    ]
