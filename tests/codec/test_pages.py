"""Storing and loading pages against a reader written byte by byte from the drawing in layout.py."""

import struct

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codec.test_packing import independent_pack
from xquant_vllm.codec.allocated import AllocatedFormat, dequantize_allocated, quantize_allocated
from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.codec.pages import load_latents, load_slots, store_latents
from xquant_vllm.codec.quantizer import quantize

POISON = 0xFF  # As FP16 this is NaN.


def independent_slot_bytes(layout: PageLayout, latents: list[torch.Tensor], slot: int) -> dict[int, int]:
    """Byte position -> byte, for one token in one slot, written from the drawing alone."""
    expected: dict[int, int] = {}
    at = 0
    tokens = [independent_token(stream, x) for stream, x in zip(layout.streams, latents, strict=True)]
    for codes, _ in tokens:
        for data in codes:
            expected.update(enumerate(data, at + slot * len(data)))
            at += layout.block_size * len(data)
    for _, parameters in tokens:
        for data in parameters:
            expected.update(enumerate(data, at + slot * len(data)))
            at += layout.block_size * len(data)
    assert at == layout.page_bytes
    return expected


def independent_token(stream: StreamFormat | AllocatedFormat, x: torch.Tensor) -> tuple[list[bytes], list[bytes]]:
    """One token's bytes: the codes of every head, and every scale, zero point and outlier."""
    if isinstance(stream, AllocatedFormat):
        codes, scales = [], []
        for head, runs in enumerate(stream.runs):
            of_head, scale = quantize_allocated(x[head], runs)
            parts = of_head.split([channels for _, channels in runs])
            packed = [independent_pack(part.tolist(), bits) for part, (bits, _) in zip(parts, runs, strict=True)]
            codes.append(b"".join(packed))
            scales.append(bytes([scale.item()]))
        return codes, scales
    if stream.bits == 16:
        return [struct.pack(f"<{stream.width}e", *head.tolist()) for head in x], []
    codes, *parameters = quantize(x, stream.bits, stream.group_size, stream.outlier_channels)
    packed = [b"".join(independent_pack(group.tolist(), stream.bits) for group in head) for head in codes]
    return packed, [struct.pack("<e", number) for section in parameters for number in section.flatten().tolist()]


@st.composite
def all_runs(draw, width: int) -> tuple[tuple[int, int], ...]:
    """Runs of a head of ``width`` channels, at least one."""
    runs, left = [], width
    for bits in (8, 6, 4, 3, 2):
        unit = 8 if bits == 3 else 4
        channels = draw(st.integers(0, left // unit)) * unit
        left -= channels
        runs += [(bits, channels)] if channels else []
    return tuple(runs) or ((6, 4),)


@st.composite
def layouts(draw) -> PageLayout:
    streams = []
    for _ in range(2):
        if draw(st.booleans()):
            width = draw(st.sampled_from([8, 20, 64]))
            heads = draw(st.integers(1, 3))
            streams.append(AllocatedFormat(width, tuple(draw(all_runs(width)) for _ in range(heads))))
            continue
        group_size = draw(st.sampled_from([8, 24, 64]))
        bits = draw(st.sampled_from([16, 8, 4, 3, 2]))
        streams.append(
            StreamFormat(
                num_heads=draw(st.integers(1, 3)),
                width=group_size * draw(st.integers(1, 3)),
                bits=bits,
                group_size=group_size,
                outlier_channels=0 if bits == 16 else draw(st.integers(0, 2)),
            )
        )
    return PageLayout(tuple(streams), draw(st.sampled_from([16, 32, 48])))


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**31), padding=st.integers(0, 3), slack=st.sampled_from([0, 64]))
def test_every_byte_is_where_the_drawing_says_and_no_other_is_touched(layout, seed, padding, slack):
    generator = torch.Generator().manual_seed(seed)
    num_blocks, tokens = 5, 7
    storage = torch.full((num_blocks, layout.page_bytes + slack), POISON, dtype=torch.uint8)
    pages = storage[:, : layout.page_bytes]
    slots = torch.randperm(num_blocks * layout.block_size, generator=generator)[:tokens]
    latents = tuple(torch.randn(tokens + padding, s.num_heads, s.width, generator=generator) for s in layout.streams)
    mapping = torch.cat([slots, torch.full((padding + 2,), -1)])
    store_latents(pages, layout, mapping, latents)

    expected = torch.full_like(storage, POISON)
    for token, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, layout.block_size)
        for position, byte in independent_slot_bytes(layout, [x[token] for x in latents], offset).items():
            expected[block, position] = byte
    assert torch.equal(storage, expected)


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_load_returns_what_was_stored_and_reads_only_the_blocks_asked_for(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    pages = torch.full((6, layout.page_bytes), POISON, dtype=torch.uint8)
    blocks = torch.tensor([4, 1])
    slots = (blocks[:, None] * layout.block_size + torch.arange(layout.block_size)).flatten()
    latents = tuple(torch.randn(slots.numel(), s.num_heads, s.width, generator=generator) for s in layout.streams)
    store_latents(pages, layout, slots, latents)
    for index, (stream, x) in enumerate(zip(layout.streams, latents, strict=True)):
        loaded = load_latents(pages, layout, blocks, index)
        assert loaded.shape == x.shape
        picked = torch.tensor([3, 0, layout.block_size + 1])
        assert torch.equal(load_slots(pages, layout, slots[picked], index), loaded[picked])
        if isinstance(stream, AllocatedFormat):
            for head, runs in enumerate(stream.runs):
                codes, scales = quantize_allocated(x[:, head], runs)
                assert torch.equal(loaded[:, head], dequantize_allocated(codes, scales, runs, stream.width))
            continue
        if not stream.quantized:
            assert torch.equal(loaded, x.half().float())
            continue
        groups = x.unflatten(-1, (-1, stream.group_size))
        groups = groups.clone()
        groups[..., 0, : stream.outlier_channels] = groups[..., 0, stream.outlier_channels :].mean(-1, keepdim=True)
        step = (groups.amax(-1) - groups.amin(-1)) / (2**stream.bits - 1)
        error = (loaded - x).abs().unflatten(-1, (-1, stream.group_size))
        assert (error <= 0.52 * step.unsqueeze(-1) + 4e-3).all()
