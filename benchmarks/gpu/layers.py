"""The layers and shapes that are timed: Llama-3.1-8B, Llama-2-7B, and a tiny one that only proves the code path."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.attention import reference
from xquant_vllm.attention.latents import LatentTerm, Prediction
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.allocation import Runs, allocate
from xquant_vllm.codec.layout import PageLayout, Stream, StreamFormat
from xquant_vllm.codec.pages import store_latents
from xquant_vllm.codec.rotation import hadamard_rotation
from xquant_vllm.projection.basis import LatentBasis
from xquant_vllm.projection.calibrated import layer_budget
from xquant_vllm.projection.integer_up import with_integer_up
from xquant_vllm.projection.predicted import joint_kv_width
from xquant_vllm.projection.rematerialize import LayerProjection
from xquant_vllm.projection.rope import RotaryTable

# How fast the weighted variances of a calibrated latent's channels fall, as powers of their index: keys lie in fewer
# directions than values.
_KEY_DECAY, _VALUE_DECAY, _JOINT_DECAY = 1.5, 0.8, 1.0
# Pages are filled with so many different tokens at most, over and over.
_DIFFERENT_TOKENS = 4096
# Query tokens of a sequence that decodes, at most: three were drafted.
DECODE_TOKENS = 4


@dataclass(frozen=True)
class Model:
    """Sizes of a model's layers."""

    name: str
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int


LLAMA_3 = Model("llama-3.1-8b", 4096, 32, 8, 128)
LLAMA_2 = Model("llama-2-7b", 4096, 32, 32, 128)
TINY = Model("tiny", 64, 2, 1, 32)

FORMATS: dict[str, tuple[str, ...]] = {
    LLAMA_3.name: ("allocated 4", "allocated 2", "uniform 4", "joint allocated 4"),
    LLAMA_2.name: ("X 4", "X chain 4+2+2+2"),
    TINY.name: ("allocated 4", "uniform 4", "X chain 4+2"),
}
"""What is timed of every model."""


@dataclass(frozen=True)
class Shape:
    """One operation on one layer.

    Attributes:
        model: whose layer.
        operation: ``"decode"``, ``"prefill"`` or ``"store"``.
        batch: sequences; of a store tokens.
        context: tokens of a sequence in the cache before its query tokens.
        query_len: query tokens of every sequence.
    """

    model: Model
    operation: str
    batch: int
    context: int = 0
    query_len: int = 1

    @property
    def name(self) -> str:
        """What tables and patterns call it."""
        if self.operation == "store":
            return f"{self.model.name} store {self.batch} tokens"
        what = f"{self.model.name} {self.operation} {self.batch} x {_tokens(self.context)}"
        return what if self.operation == "decode" and self.query_len == 1 else f"{what} + {_tokens(self.query_len)}"

    @property
    def seq_len(self) -> int:
        """Cached tokens of a sequence when attention runs."""
        return self.context + self.query_len


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count and count % 1024 == 0 else str(count)


def shapes() -> list[Shape]:
    """All that is timed, the most important first."""
    first = [
        Shape(LLAMA_3, "decode", 16, 4096),
        Shape(LLAMA_3, "decode", 1, 16384),
        Shape(LLAMA_3, "decode", 64, 4096),
        Shape(LLAMA_3, "store", 8192),
        Shape(LLAMA_3, "decode", 1, 4096),
        Shape(LLAMA_3, "prefill", 1, 0, 2048),
        Shape(LLAMA_3, "decode", 16, 16384),
        Shape(LLAMA_2, "decode", 16, 4096),
        Shape(LLAMA_2, "store", 8192),
        Shape(LLAMA_3, "decode", 16, 4096, 4),
        Shape(LLAMA_3, "decode", 64, 1024),
        Shape(LLAMA_3, "decode", 1, 65536),
        Shape(LLAMA_3, "decode", 128, 4096),
        Shape(LLAMA_3, "prefill", 1, 8192, 2048),
        Shape(LLAMA_2, "prefill", 1, 0, 2048),
        Shape(LLAMA_2, "decode", 1, 4096),
    ]
    rest = [
        Shape(model, "decode", batch, context, query_len)
        for model in (LLAMA_3, LLAMA_2)
        for query_len in (1, DECODE_TOKENS)
        for context in (4096, 1024, 16384, 65536)
        for batch in (1, 4, 16, 64, 128)
    ]
    rest += [Shape(model, "prefill", 1, context, 2048) for model in (LLAMA_3, LLAMA_2) for context in (0, 8192)]
    rest += [Shape(model, "store", tokens) for model in (LLAMA_3, LLAMA_2) for tokens in (1024, 128, 16, 1, 8192)]
    return list(dict.fromkeys(first + rest))


def tiny_shapes() -> list[Shape]:
    """One of every operation, as small as can be."""
    return [
        Shape(TINY, "decode", 2, 9),
        Shape(TINY, "decode", 1, 7, 4),
        Shape(TINY, "prefill", 1, 5, 8),
        Shape(TINY, "store", 4),
    ]


def calibrated_runs(model: Model, bits: int, generator: torch.Generator) -> tuple[tuple[Runs, ...], tuple[Runs, ...]]:
    """Bits of the channels of every key and every value head, as calibration gives them: each kv head's key and value
    share the budget by their variances, which fall differently in every head.
    """
    budget = layer_budget(model.kv_heads, model.head_size, model.hidden_size, bits, joint_kv=False)
    pairs = [
        allocate(
            [_variances(model.head_size, decay, generator) for decay in (_KEY_DECAY, _VALUE_DECAY)],
            budget // model.kv_heads - 2,
        )
        for _ in range(model.kv_heads)
    ]
    return tuple(key for key, _ in pairs), tuple(value for _, value in pairs)


def _variances(width: int, decay: float, generator: torch.Generator) -> torch.Tensor:
    decay *= 1 + 0.2 * float(torch.rand(1, generator=generator))
    spread = (0.3 * torch.randn(width, generator=generator)).exp()
    return (spread * torch.arange(1, width + 1) ** -decay).sort(descending=True).values


def make_layer(
    model: Model, name: str, positions: int, block_size: int, device: torch.device, seed: int
) -> AttentionLayerPlan:
    """A layer with random weights.

    Args:
        model: its sizes.
        name: one of ``FORMATS``.
        positions: of its RoPE table.
        block_size: tokens of a page.
        device: where its tensors are.
        seed: of its weights and runs.
    """
    generator = torch.Generator().manual_seed(seed)
    what, bits = name.rsplit(" ", 1)
    streams, terms, width = _streams(model, what, bits, generator)
    layouts = [PageLayout(tuple(streams[0]), block_size), *(PageLayout(tuple(of), block_size) for of in streams[1:])]
    more: dict[str, object] = {}
    if terms is not None:
        more = {"key_terms": terms, "value_terms": terms}
    if what.startswith("X"):
        rotation = hadamard_rotation(width, seed)
        more["rotation"] = rotation.to(device)
        if len(layouts) > 1:
            more["prediction"] = Prediction(tuple(terms[:-1]) if terms else ())
    frequencies = 500000.0 ** (-torch.arange(0, model.head_size, 2) / model.head_size)
    angles = (torch.arange(positions)[:, None] * frequencies).to(device)

    def up() -> torch.Tensor:
        drawn = torch.randn(model.kv_heads, width, model.head_size, generator=generator)
        return drawn.to(device) * width**-0.5

    up_key, up_value = up(), None
    if terms is None:  # as served: kernels may multiply by integers, and o_proj up-projects the values
        no_down = torch.zeros(model.kv_heads, 1, width, device=device)
        up_key = with_integer_up(LatentBasis(no_down, up_key), streams[0][0]).up
    else:
        up_value = up()
    projection = LayerProjection(up_key, up_value, rope=RotaryTable(angles.cos(), angles.sin()))
    return AttentionLayerPlan(tuple(layouts), projection, model.heads, model.head_size**-0.5, **more)  # type: ignore[arg-type]


def _streams(
    model: Model, what: str, bits: str, generator: torch.Generator
) -> tuple[list[list[Stream]], tuple[LatentTerm, ...] | None, int]:
    """Streams of the layer's own pages and of earlier layers', the terms if not the usual ones, and the width."""
    heads, size, hidden = model.kv_heads, model.head_size, model.hidden_size
    if what == "uniform":
        return [[StreamFormat(heads, size, int(bits), size) for _ in range(2)]], None, size
    if what == "allocated":
        keys, values = calibrated_runs(model, int(bits), generator)
        return [[AllocatedFormat(size, keys), AllocatedFormat(size, values)]], None, size
    if what == "joint allocated":
        width = joint_kv_width(hidden, heads, size)
        budget = layer_budget(heads, size, hidden, int(bits), joint_kv=True) - 1
        runs = (allocate([_variances(width, _JOINT_DECAY, generator)], budget)[0],)
        return [[AllocatedFormat(width, runs)]], (LatentTerm(0, 0),), width
    group = min(128, hidden)
    if what == "X":
        return [[StreamFormat(1, hidden, int(bits), group)]], (LatentTerm(0, 0),), hidden
    if what == "X chain":  # an anchor and the differences after it, the layer's own last
        of_layers = [int(part) for part in bits.split("+")]
        streams: list[list[Stream]] = [[StreamFormat(1, hidden, of, group)] for of in (of_layers[-1], *of_layers[:-1])]
        read = [LatentTerm(page, 0, adds=page > 1) for page in range(1, len(streams))]
        return streams, (*read, LatentTerm(0, 0, adds=True)), hidden
    raise ValueError(f"there is no format {what} {bits}")


def fill_pages(plan: AttentionLayerPlan, blocks: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Pages of a layer (and of the earlier ones that it reads) full of random tokens, a few thousand different ones."""
    device = plan.projection.up_key.device
    generator = torch.Generator(device).manual_seed(seed)
    block_size = plan.layout.block_size
    different = min(blocks, max(1, _DIFFERENT_TOKENS // block_size))
    tokens = different * block_size
    slots = torch.arange(tokens, device=device)

    def inputs(layout: PageLayout) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.randn(tokens, s.num_heads * s.width, generator=generator, device=device) for s in layout.streams
        )

    pages = [torch.zeros(different, of.page_bytes, dtype=torch.uint8, device=device) for of in plan.layouts]
    for of, written in list(zip(plan.layouts, pages, strict=True))[1:]:
        store_latents(written, of, slots, inputs(of))
    reference.store(pages, plan, slots, inputs(plan.layout))
    return tuple(_repeated(written, blocks) for written in pages)


def _repeated(pages: torch.Tensor, blocks: int) -> torch.Tensor:
    result = torch.empty(blocks, pages.shape[1], dtype=torch.uint8, device=pages.device)
    for begin in range(0, blocks, pages.shape[0]):
        part = result[begin : begin + pages.shape[0]]
        part.copy_(pages[: part.shape[0]])
    return result


def page_bytes_of(plan: AttentionLayerPlan, tokens: Sequence[int]) -> int:
    """Bytes of all pages that sequences of so many tokens take."""
    blocks = sum(-(-count // plan.layout.block_size) for count in tokens)
    return blocks * sum(layout.page_bytes for layout in plan.layouts)
