"""Storing and loading pages against a reader written byte by byte from the drawing in layout.py."""

import struct

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codec.test_packing import independent_pack
from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.codec.pages import load_latents, load_slots, store_latents
from xquant_vllm.codec.quantizer import quantize

POISON = 0xFF  # As FP16 this is NaN.


def independent_slot_bytes(layout: PageLayout, latents: list[torch.Tensor], slot: int) -> dict[int, int]:
    """Byte position -> byte, for one token in one slot, written from the drawing alone."""
    expected: dict[int, int] = {}
    at = 0
    nothing = torch.empty(0, 0)
    quantized = [
        quantize(x, s.bits, s.group_size, s.outlier_channels) if s.bits < 16 else (x, nothing, nothing, nothing)
        for s, x in zip(layout.streams, latents, strict=True)
    ]
    for stream, (codes, _, _, _) in zip(layout.streams, quantized, strict=True):
        row = stream.width * stream.bits // 8
        for head in range(stream.num_heads):
            if stream.bits == 16:
                data = struct.pack(f"<{stream.width}e", *codes[head].tolist())
            else:
                data = b"".join(independent_pack(group.tolist(), stream.bits) for group in codes[head])
            start = at + (head * layout.block_size + slot) * row
            expected.update(zip(range(start, start + row), data, strict=True))
        at += stream.num_heads * layout.block_size * row
    for _, scales, zeros, outliers in quantized:
        for section in (scales, zeros, outliers):
            for head in range(section.shape[0]):
                for column in range(section.shape[1]):
                    start = at + 2 * ((head * section.shape[1] + column) * layout.block_size + slot)
                    expected.update(enumerate(struct.pack("<e", section[head, column].item()), start))
            at += 2 * section.numel() * layout.block_size
    assert at == layout.page_bytes
    return expected


@st.composite
def layouts(draw) -> PageLayout:
    streams = []
    for _ in range(2):
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
        if not stream.quantized:
            assert torch.equal(loaded, x.half().float())
            continue
        groups = x.unflatten(-1, (-1, stream.group_size))
        groups = groups.clone()
        groups[..., 0, : stream.outlier_channels] = groups[..., 0, stream.outlier_channels :].mean(-1, keepdim=True)
        step = (groups.amax(-1) - groups.amin(-1)) / (2**stream.bits - 1)
        error = (loaded - x).abs().unflatten(-1, (-1, stream.group_size))
        assert (error <= 0.52 * step.unsqueeze(-1) + 4e-3).all()
