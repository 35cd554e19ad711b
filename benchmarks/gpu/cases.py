"""Random layers and batches, in pages where everything that must not be read is poison: what kernels are checked on.

Shared by the tests and by the GPU suite, which runs where the tests' packages are not installed.
"""

import random
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from xquant_vllm.attention import reference
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.latents import LatentTerm, Prediction
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.allocation import Runs
from xquant_vllm.codec.layout import PageLayout, Stream, StreamFormat
from xquant_vllm.codec.pages import store_latents
from xquant_vllm.codec.rotation import hadamard_rotation
from xquant_vllm.projection.rematerialize import HeadNorm, LayerProjection
from xquant_vllm.projection.rope import RotaryTable

ABSURD_BLOCKS = (2**31 - 1, -(2**31), -1, 10**6)
MAX_POSITION = 2100  # no multiple of 16


@dataclass(frozen=True)
class Spec:
    """What a case is made of."""

    seqs: tuple[tuple[int, int], ...] = ((70, 3),)  # cached tokens including the query tokens, query tokens
    kv_heads: int = 2
    group: int = 3
    head_size: int = 64
    joint: bool = False
    kind: str = "latent"  # "latent", "x", "deltas" (of X) or "chain" (of latents)
    earlier: tuple[int, ...] = ()  # bits of the pages of earlier layers, for "deltas" and "chain"
    hidden_size: int = 192  # for "x" and "deltas"
    key_bits: int = 4
    value_bits: int = 4
    key_group: int = 64
    value_group: int = 64
    key_outliers: int = 1
    value_outliers: int = 0
    allocated: float = 0.0  # share of the streams whose channels have different bits; of "deltas" none
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    bias: bool = False
    norm: bool = False
    rope: str = "neox"  # "neox", "interleaved" or "none"
    rotary_size: int | None = None
    window: int | None = None
    soft_cap: float | None = None
    strided: bool = False
    sinks: bool = False
    folded: bool = False  # whether value latents are the values, where they are as wide as a head
    host_lengths: bool = False  # whether the batch says on the host how long its sequences are
    decode_tokens: int = 1  # query tokens of sequences that decode, at most
    exact_from: int | None = None  # query tokens of a sequence from which on it attends to them exactly
    seed: int = 0


def random_runs(choose: random.Random, width: int) -> Runs:
    """Some channels of some numbers of bits, in runs as an allocation makes them."""
    unit = 4 if width <= 256 else 16
    left = width // unit * unit
    runs: list[tuple[int, int]] = []
    for bits in (8, 6, 4, 3, 2):
        channels = choose.choice((0, unit, choose.randint(0, left // unit) * unit, left))
        channels = min(channels, left) // (8 if bits == 3 else 4) * (8 if bits == 3 else 4)
        left -= channels
        runs += [(bits, min(256, channels - start)) for start in range(0, channels, 256)]
    return tuple(runs) or ((4, unit),)


@dataclass(frozen=True)
class Case:
    """A layer, its pages, a batch, its queries and what was stored of their tokens."""

    plan: AttentionLayerPlan
    pages: tuple[torch.Tensor, ...]
    batch: AttentionBatch
    query: torch.Tensor
    inputs: tuple[torch.Tensor, ...]

    def run(self, kernels: Any, output: torch.Tensor | None = None) -> torch.Tensor:
        """What ``kernels.paged_attention`` makes of it."""
        if output is None:
            output = torch.full(self.query.shape, 77.0, dtype=self.query.dtype)
        exact = () if self.plan.exact_from is None else (self.inputs,)
        kernels.paged_attention(self.query, self.pages, self.plan, self.batch, output, *exact)
        return output

    def only(self, sequence: int, last: int | None = None) -> "Case":
        """This sequence alone, with its last query tokens or all of them."""
        starts, batch = self.batch.query_start_loc.tolist(), self.batch
        begin, end = starts[sequence], starts[sequence + 1]
        begin = begin if last is None else end - last
        alone = AttentionBatch(
            torch.tensor([0, end - begin], dtype=torch.int32),
            batch.seq_lens[sequence : sequence + 1],
            batch.block_table[sequence : sequence + 1],
        )
        inputs = tuple(x[begin:end] for x in self.inputs)
        return replace(self, batch=alone, query=self.query[begin:end], inputs=inputs)


def make_plan(spec: Spec) -> AttentionLayerPlan:
    """A random layer."""
    generator = torch.Generator().manual_seed(spec.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kv_heads, head_size = spec.kv_heads, spec.head_size
    latent_heads, width = (1, kv_heads * head_size) if spec.joint else (kv_heads, head_size)
    if spec.kind in ("x", "deltas"):
        latent_heads, width = 1, spec.hidden_size

    choose = random.Random(spec.seed)

    def stream(bits: int, group: int, outliers: int) -> Stream:
        if spec.kind != "deltas" and choose.random() < spec.allocated:
            return AllocatedFormat(width, tuple(random_runs(choose, width) for _ in range(latent_heads)))
        outliers = 0 if bits == 16 or spec.kind == "deltas" else min(outliers, group - 1)
        return StreamFormat(latent_heads, width, bits, group, outliers)

    streams = [stream(spec.key_bits, spec.key_group, spec.key_outliers)]
    terms: dict = {}
    if spec.kind == "latent":
        streams.append(stream(spec.value_bits, spec.value_group, spec.value_outliers))
    elif spec.kind == "x":
        terms = {"key_terms": (LatentTerm(0, 0),), "value_terms": (LatentTerm(0, 0),)}
        terms["rotation"] = hadamard_rotation(width, spec.seed)
    layouts = [PageLayout(tuple(streams), spec.block_size)]
    if spec.kind in ("deltas", "chain"):
        deltas = spec.kind == "deltas"
        layouts += [PageLayout((stream(bits, spec.key_group, 1),), spec.block_size) for bits in spec.earlier]
        read = [LatentTerm(page, 0, adds=deltas and page > 1) for page in range(1, len(layouts))]
        matrix, own = None, width
        width = width if deltas else width * len(layouts)
        if not deltas:
            matrix = normal(latent_heads, width - own, own) / width**0.5
        latent = (*read, LatentTerm(0, 0, adds=deltas))
        terms = {"key_terms": latent, "value_terms": latent, "prediction": Prediction(tuple(read), matrix)}
        if deltas:
            terms["rotation"] = hadamard_rotation(width, spec.seed)
    rope = None
    if spec.rope != "none":
        rotary_size = spec.rotary_size or head_size
        frequencies = 10000.0 ** (-torch.arange(0, rotary_size, 2) / rotary_size)
        angles = torch.arange(MAX_POSITION)[:, None] * frequencies
        rope = RotaryTable(angles.cos(), angles.sin(), spec.rope == "interleaved")
    up_key, up_value = (normal(kv_heads, width, head_size) / width**0.5 for _ in range(2))
    projection = LayerProjection(
        up_key=up_key,
        up_value=None if spec.folded and width == head_size else up_value,
        key_bias=normal(kv_heads, head_size) if spec.bias else None,
        value_bias=normal(kv_heads, head_size) if spec.bias else None,
        key_norm=HeadNorm(1 + 0.3 * normal(kv_heads, head_size), 0.1) if spec.norm else None,
        rope=rope,
    )
    heads = kv_heads * spec.group
    scale = 2.0 * head_size**-0.5
    if spec.sinks:
        terms["sinks"] = normal(heads)
    terms["exact_from"] = spec.exact_from
    return AttentionLayerPlan(tuple(layouts), projection, heads, scale, spec.window, spec.soft_cap, **terms)


def random_latents(layout: PageLayout, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """For every stream ``[tokens, num_heads * width]``."""
    return tuple(torch.randn(tokens, s.num_heads * s.width, generator=generator) for s in layout.streams)


def make_case(spec: Spec) -> Case:
    """Only visible tokens are stored; all other bytes are 0xFF (NaN scales) and all other block ids absurd.

    Nor are tokens stored that are attended to exactly.
    """
    plan = make_plan(spec)
    layout, block_size = plan.layout, spec.block_size
    generator = torch.Generator().manual_seed(spec.seed + 1)
    blocks = [-(-length // block_size) for length, _ in spec.seqs]
    total = sum(blocks) + 2
    pages = tuple(
        torch.full((total, of.page_bytes + (48 if spec.strided else 0)), 0xFF, dtype=torch.uint8)[:, : of.page_bytes]
        for of in plan.layouts
    )
    free = torch.randperm(total, generator=generator).tolist()
    table = torch.empty(len(blocks) + 2, max(blocks) + 3, dtype=torch.int32)
    for index in range(table.numel()):
        table.view(-1)[index] = ABSURD_BLOCKS[index % len(ABSURD_BLOCKS)]
    inputs: list[list[torch.Tensor]] = []
    for index, (length, new) in enumerate(spec.seqs):
        if new == 0:
            continue
        oldest = max(0, length - new - spec.window + 1) if spec.window else 0
        for block in range(oldest // block_size, blocks[index]):
            table[index, block] = free.pop()
        positions = torch.arange(oldest, length)
        slots = table[index].long()[positions // block_size] * block_size + positions % block_size
        exact = spec.exact_from is not None and new >= spec.exact_from
        stored = slots[:-new] if exact else slots
        for of, written in list(zip(plan.layouts, pages, strict=True))[1:]:
            latents = random_latents(of, len(positions), generator)
            store_latents(written, of, stored, tuple(x[: len(stored)] for x in latents))
        latents = random_latents(layout, len(positions), generator)
        reference.store(pages, plan, stored, [x[: len(stored)] for x in latents])
        inputs.append([x[-new:] for x in latents])
    # Two sequences of padding at the end.
    counts = [new for _, new in spec.seqs] + [0, 0]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    lengths = torch.tensor([length for length, _ in spec.seqs] + [0, 10**9], dtype=torch.int32)
    tokens = int(starts[-1]) + 2  # padding, too
    shape = (tokens, plan.num_heads, spec.head_size)
    if spec.strided:
        wide = torch.randn(tokens, plan.num_heads + 3, spec.head_size + 8, generator=generator).to(spec.dtype)
        query = wide[:, 2:-1, : spec.head_size]
    else:
        query = torch.randn(shape, generator=generator).to(spec.dtype)
    inputs.append([torch.full((2, s.num_heads * s.width), torch.nan) for s in layout.streams])
    on_host = tuple(zip(counts, lengths.tolist(), strict=True)) if spec.host_lengths else None
    batch = AttentionBatch(starts, lengths, table, lengths=on_host, decode_tokens=spec.decode_tokens)
    return Case(plan, pages, batch, query, tuple(torch.cat(of) for of in zip(*inputs, strict=True)))


def on_device(value: Any, device: torch.device) -> Any:
    """A copy with all tensors on a device, strides kept: of a case, a plan, and of all that they are made of."""
    if isinstance(value, torch.Tensor):
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return moved.copy_(value)
    if isinstance(value, tuple):
        return tuple(on_device(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type | StreamFormat | AllocatedFormat | PageLayout):
        return replace(value, **{of.name: on_device(getattr(value, of.name), device) for of in fields(value)})
    return value
