"""Latents that are hard to store, and pages that were stored compared with those of the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tests.attention.attention_cases import Spec, make_plan, random_latents
from xquant_vllm.attention import reference
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat, channel_tables
from xquant_vllm.codec.pages import load_slots, store_latents

# Around the limits of FP16, ties of rounding, and what is no number.
SPECIAL = (0.0, -0.0, 1.0, 0.5, -2.5, 65504.0, 65520.0, 1e6, -1e30, 6e-8, 3e-8, -1e-7, 1e-40, 2.0**-14, 1.0009766,
           float("inf"), float("-inf"), float("nan"))  # fmt: skip


def special_latents(spec: Spec, tokens: int, kind: str, width: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(tokens, width, generator=generator) * 10 ** torch.randn(tokens, 1, generator=generator)
    if kind == "special":
        chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), x.shape, generator=generator)]
        rare = torch.rand(tokens, 1, generator=generator) * 0.3
        x = torch.where(torch.rand(x.shape, generator=generator) < rare, chosen, x)
    elif kind == "constant":
        x = x[:, :1].expand(-1, width).clone()
        x[:, ::64] += torch.rand(tokens, 1, generator=generator) * 1e-4
    else:
        x = torch.where(torch.rand(tokens, 1, generator=generator) < 0.3, x.round(), x)  # many ties
    return x.to(spec.dtype)


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor, plan, index: int) -> None:
    """Codes byte for byte; FP16 sections by value: a NaN is a NaN, and torch's minimum picks either zero."""
    stream, at, slots = plan.layout.streams[index], plan.layout.offsets[index], plan.layout.block_size
    codes = slice(at.codes, at.codes + slots * stream.code_bytes)
    assert torch.equal(actual[:, codes], expected[:, codes])
    halves = slice(at.scales, at.scales + slots * sum(stream.parameter_bytes))
    x, y = (pages[:, halves].contiguous().view(torch.float16) for pages in (actual, expected))
    torch.testing.assert_close(x, y, atol=0, rtol=0, equal_nan=True)


def _read(pages: torch.Tensor, plan, slots: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers ``[n, heads, width]`` and scales ``[n, heads]`` of an allocated stream."""
    stream, layout = plan.layout.streams[index], plan.layout
    start = layout.offsets[index].scales
    scales = pages[:, start : start + layout.block_size * stream.num_heads].unflatten(1, (-1, layout.block_size))
    return load_slots(pages, layout, slots, index), scales[slots // layout.block_size, :, slots % layout.block_size]


def assert_as_good(actual: torch.Tensor, expected: torch.Tensor, plan, index: int, slots, x: torch.Tensor) -> None:
    """Scales that leave the same error of ``x``; under the same one equal numbers, but for ties of rounding."""
    stream = plan.layout.streams[index]
    x = x.float().reshape(len(slots), stream.num_heads, stream.width).nan_to_num(0, 3e38, -3e38)
    (read, scales), (wanted, wanted_scales) = (_read(pages, plan, slots, index) for pages in (actual, expected))
    for head, runs in enumerate(stream.runs):
        step, largest, worth = channel_tables(runs)
        stored = step.numel()
        errors = [
            ((y[:, head, :stored].double() - x[:, head, :stored].double()).square() * worth).sum(-1)
            for y in (read, wanted)
        ]
        torch.testing.assert_close(errors[0], errors[1], atol=0, rtol=1e-5)
        same = scales[:, head] == wanted_scales[:, head]
        spacing = torch.exp2((scales[same, head].double() - 128) / 8).unsqueeze(-1) * step
        y, y_wanted, exact = (v[same, head, :stored].double() for v in (read, wanted, x))
        between = exact / spacing + largest / 2
        tie = ((between - between.floor() - 0.5).abs() < 1e-4) & ((y - y_wanted).abs() < 1.01 * spacing)
        assert ((y == y_wanted) | tie).all()
        assert tie.logical_and(y != y_wanted).sum() <= 2
    assert (read[..., :1].isfinite()).all()


def assert_same_pages(actual: torch.Tensor, expected: torch.Tensor, plan, slots: torch.Tensor, inputs) -> None:
    """What ``inputs`` without padding became: the same bytes, and of allocated streams what reads back as well."""
    for index, stream in enumerate(plan.layout.streams):
        if isinstance(stream, AllocatedFormat):
            assert_as_good(actual, expected, plan, index, slots, inputs[index])
        else:
            assert_same_bytes(actual, expected, plan, index)
    assert_same_elsewhere(actual, expected, plan, slots)


def assert_same_elsewhere(actual: torch.Tensor, expected: torch.Tensor, plan, slots: torch.Tensor) -> None:
    """All bytes but those of the slots are the same: overwrites the slots in both, then compares."""
    zeros = tuple(torch.zeros(len(slots), s.num_heads, s.width) for s in plan.layout.streams)
    for pages in (actual, expected):
        store_latents(pages, plan.layout, slots, zeros)
    assert torch.equal(actual, expected)


def assert_nearly_same_pages(actual: torch.Tensor, expected: torch.Tensor, plan, slots: torch.Tensor) -> None:
    """What is computed before it is quantized differs in its last bits: now and then a code is another by one."""
    stream = plan.layout.streams[0]
    if isinstance(stream, AllocatedFormat):
        (x, scales), (y, wanted_scales) = (_read(pages, plan, slots, 0) for pages in (actual, expected))
        assert torch.equal(scales, wanted_scales)
        spacing = torch.exp2((scales.double() - 128) / 8).float().unsqueeze(-1)
        step = torch.stack([F.pad(channel_tables(runs)[0], (0, stream.width))[: stream.width] for runs in stream.runs])
        step = step * spacing
    else:
        x, y = (load_slots(pages, plan.layout, slots, 0) for pages in (actual, expected))
        groups = y.unflatten(-1, (-1, stream.group_size))
        step = (groups.amax(-1) - groups.amin(-1)) / (2**stream.bits - 1)
        step = step if stream.quantized else groups.abs().amax(-1) * 2**-10
        step = step.repeat_interleave(stream.group_size, -1)
    error = (x - y).abs()
    assert (error <= 1.1 * step + 1e-6).all()
    # At 8 bits a step is 1/255 of the range: differences of 1e-6 of it rarely decide.
    assert (error > 0.1 * step).sum() <= 0.01 * error.numel()
    assert_same_elsewhere(actual, expected, plan, slots)


@dataclass(frozen=True)
class StoreCase:
    """A call of ``store``, on pages with bytes that must survive where nothing is stored."""

    plan: AttentionLayerPlan
    memory: torch.Tensor
    earlier: Sequence[torch.Tensor]
    slots: torch.Tensor
    inputs: Sequence[torch.Tensor]

    @property
    def exact(self) -> bool:
        """Whether what is quantized was not computed before."""
        return self.plan.rotation is None and self.plan.prediction is None

    def check(self, store: Callable[..., None]) -> None:
        """Compare a store with the reference's."""
        plan, size, tokens = self.plan, self.plan.layout.page_bytes, self.inputs[0].shape[0]
        actual, expected = self.memory.clone(), self.memory.clone()
        store((actual[:, :size], *self.earlier), plan, self.slots, self.inputs)
        reference.store((expected[:, :size], *self.earlier), plan, self.slots, self.inputs)
        stored = self.slots[:tokens] >= 0
        kept = self.slots[:tokens][stored]
        if self.exact:
            assert_same_pages(actual[:, :size], expected[:, :size], plan, kept, [x[stored] for x in self.inputs])
        else:
            assert_nearly_same_pages(actual[:, :size], expected[:, :size], plan, kept)
        assert torch.equal(actual[:, size:], expected[:, size:])


def make_store_case(spec: Spec, tokens: int, kind: str) -> StoreCase:
    """Random slots, some of them padding, and latents of a kind: "normal", "special" or "constant"."""
    plan = make_plan(spec)
    if plan.rotation is not None or plan.prediction is not None:
        kind = "normal"
    generator = torch.Generator().manual_seed(spec.seed)
    # Bytes between the pages must survive as well.
    row = plan.layout.page_bytes + (48 if spec.strided else 0)
    blocks = 60 // spec.block_size + 2
    memory = torch.randint(256, (blocks, row), dtype=torch.uint8, generator=generator)
    slots = torch.randperm(blocks * spec.block_size, generator=generator)[: tokens + 2]
    slots[torch.rand(tokens + 2, generator=generator) < 0.2] = -1
    kept = slots[:tokens][slots[:tokens] >= 0]
    # Of earlier layers' pages only these slots may be read.
    earlier = [torch.full((blocks, layout.page_bytes), 0xFF, dtype=torch.uint8) for layout in plan.layouts[1:]]
    for layout, pages in zip(plan.layouts[1:], earlier, strict=True):
        store_latents(pages, layout, kept, random_latents(layout, len(kept), generator))
    inputs = []
    for stream in plan.layout.streams:
        width = stream.num_heads * stream.width
        x = special_latents(spec, tokens, kind, width, generator)
        if spec.strided:  # a slice of a wider projection, seen as heads
            wide = torch.full((tokens, width + 24), torch.nan, dtype=spec.dtype)
            wide[:, 8 : 8 + width] = x
            x = wide[:, 8 : 8 + width].unflatten(1, (stream.num_heads, stream.width))
        inputs.append(x)
    return StoreCase(plan, memory, earlier, slots, inputs)
