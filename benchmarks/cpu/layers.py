"""Layers as the server builds them, from random weights, with pages in which every layer's bytes are its own."""

from dataclasses import dataclass

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.cpu import kernels as cpu
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.codec.rotation import hadamard_rotation
from xquant_vllm.projection.basis import factorize
from xquant_vllm.projection.chain import input_up_projection
from xquant_vllm.projection.integer_up import with_integer_up
from xquant_vllm.projection.rematerialize import LayerProjection
from xquant_vllm.projection.rope import RotaryTable

BLOCK_SIZE = 128
"""vLLM's on CPUs."""
_X_GROUP = 64


@dataclass(frozen=True)
class Model:
    """Sizes of a model's layers.

    Attributes:
        name: of the model.
        layers: how many it has; a benchmark goes through as many, so that no cache of the processor holds them all.
        hidden_size: channels of a layer's input.
        heads: query heads.
        kv_heads: heads of keys and values.
        head_size: channels of a head.
    """

    name: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int


MODELS = {
    model.name: model
    for model in (
        Model("smollm2-135m", 30, 576, 9, 3, 64),
        Model("smollm2-135m-mha", 30, 576, 9, 9, 64),  # its kv heads repeated
        Model("gemma-3-270m", 18, 640, 4, 1, 256),
        Model("llama-3.1-8b", 4, 4096, 32, 8, 128),
        Model("llama-2-7b", 1, 4096, 32, 32, 128),
    )
}


def make_plan(model: Model, holds: str, bits: int, positions: int, *, fold_values: bool = True) -> AttentionLayerPlan:
    """A layer with random weights.

    Args:
        model: its sizes.
        holds: ``"latents"``, with a basis per kv head, or ``"x"``, the layer input.
        bits: of its codes.
        positions: of its RoPE table.
        fold_values: whether the output projection up-projects value latents, as when served; not those of X.
    """
    generator = torch.Generator().manual_seed(0)
    rows = model.kv_heads * model.head_size
    key, value = (torch.randn(rows, model.hidden_size, generator=generator) / model.hidden_size**0.5 for _ in range(2))
    frequencies = 1e5 ** (-torch.arange(0, model.head_size, 2) / model.head_size)
    angles = torch.arange(positions)[:, None] * frequencies
    rope = RotaryTable(angles.cos(), angles.sin())
    scale = model.head_size**-0.5
    if holds == "x":
        rotation = hadamard_rotation(model.hidden_size, 0)
        ups = [input_up_projection(w, model.kv_heads, rotation) for w in (key, value)]
        layout = PageLayout((StreamFormat(1, model.hidden_size, bits, _X_GROUP),), BLOCK_SIZE)
        terms = (LatentTerm(0, 0),)
        projection = LayerProjection(ups[0], ups[1], rope=rope)
        return AttentionLayerPlan(
            (layout,), projection, model.heads, scale, key_terms=terms, value_terms=terms, rotation=rotation
        )
    streams = tuple(StreamFormat(model.kv_heads, model.head_size, bits, model.head_size, n) for n in (1, 0))
    bases = [
        factorize(
            weight,
            model.kv_heads,
            "head",
            outlier_channels=stream.outlier_channels,
            rotate=True,
            seed=0,
            dtype=torch.bfloat16,
        )
        for weight, stream in zip((key, value), streams, strict=True)
    ]
    key_basis = with_integer_up(bases[0], streams[0])
    projection = LayerProjection(key_basis.up, None if fold_values else bases[1].up, rope=rope)
    return AttentionLayerPlan((PageLayout(streams, BLOCK_SIZE),), projection, model.heads, scale)


def latents(plan: AttentionLayerPlan, tokens: int) -> tuple[torch.Tensor, ...]:
    """Random BF16 inputs of a store."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(tokens, stream.num_heads * stream.width, generator=generator).bfloat16()
        for stream in plan.layout.streams
    )


def filled_pages(plan: AttentionLayerPlan, blocks: int, layers: int) -> list[torch.Tensor]:
    """For every layer pages full of random tokens, the same bytes at other addresses."""
    pages = torch.zeros(blocks, plan.layout.page_bytes, dtype=torch.uint8)
    once = min(blocks, 32)
    tokens = once * BLOCK_SIZE
    cpu.store((pages,), plan, torch.arange(tokens), latents(plan, tokens))
    for begin in range(once, blocks, once):
        part = pages[begin : begin + once]
        part.copy_(pages[: len(part)])
    return [pages, *(pages.clone() for _ in range(layers - 1))]


def decode_batch(sequences: int, context: int) -> AttentionBatch:
    """One query token for each of some sequences of equal length, their blocks in random order."""
    per_sequence = -(-context // BLOCK_SIZE)
    order = torch.randperm(sequences * per_sequence, generator=torch.Generator().manual_seed(2))
    return AttentionBatch(
        torch.arange(sequences + 1, dtype=torch.int32),
        torch.full((sequences,), context, dtype=torch.int32),
        order.to(torch.int32).unflatten(0, (sequences, per_sequence)),
    )
