"""Pages of any format, through any sequence of stores, of any floats: a token is in its own bytes and in no others."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codec.test_pages import POISON, all_runs
from xquant_vllm.codec.allocated import AllocatedFormat, dequantize_allocated, quantize_allocated
from xquant_vllm.codec.layout import UNIFORM_BITS, PageLayout, StreamFormat
from xquant_vllm.codec.pages import load_latents, load_slots, store_latents
from xquant_vllm.codec.quantizer import dequantize, quantize, to_fp16

BLOCKS = 4


@st.composite
def streams(draw) -> StreamFormat | AllocatedFormat:
    heads = draw(st.integers(1, 5))
    if draw(st.booleans()):
        width = draw(st.integers(2, 80)) * 4
        return AllocatedFormat(width, tuple(draw(all_runs(width)) for _ in range(heads)))
    group_size, bits = draw(st.integers(1, 20)) * 8, draw(st.sampled_from(UNIFORM_BITS))
    outliers = 0 if bits == 16 else draw(st.integers(0, group_size - 1))
    return StreamFormat(heads, group_size * draw(st.integers(1, 4)), bits, group_size, outliers)


@st.composite
def layouts(draw) -> PageLayout:
    return PageLayout(tuple(draw(st.lists(streams(), min_size=1, max_size=3))), 16 * draw(st.integers(1, 4)))


@st.composite
def stores(draw, layout: PageLayout) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Slots, some of them padding, and latents of a few floats: limits, NaN, infinities and subnormal ones too."""
    size = BLOCKS * layout.block_size
    slots = draw(st.lists(st.integers(-1, size - 1), min_size=1, max_size=6, unique_by=lambda slot: (slot, slot < 0)))
    numbers = torch.tensor(draw(st.lists(st.floats(width=32), min_size=1, max_size=5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    latents = tuple(
        numbers[torch.randint(len(numbers), (len(slots), s.num_heads, s.width), generator=generator)]
        for s in layout.streams
    )
    return torch.tensor(slots), latents


def once(stream: StreamFormat | AllocatedFormat, x: torch.Tensor) -> torch.Tensor:
    """``[n, heads, width]`` quantized and read back, without pages."""
    if isinstance(stream, AllocatedFormat):
        heads = [dequantize_allocated(*quantize_allocated(x[:, i], runs), runs, stream.width)
                 for i, runs in enumerate(stream.runs)]  # fmt: skip
        return torch.stack(heads, 1)
    if not stream.quantized:
        return to_fp16(x).float()
    return dequantize(*quantize(x, stream.bits, stream.group_size, stream.outlier_channels))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=0, rtol=0, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), layout=layouts())
def test_a_slot_holds_what_was_stored_last_whatever_else_was(data, layout) -> None:
    storage = torch.full((BLOCKS, layout.page_bytes + 32), POISON, dtype=torch.uint8)
    pages = storage[:, : layout.page_bytes]
    last: dict[int, tuple[torch.Tensor, ...]] = {}
    for _ in range(data.draw(st.integers(1, 4))):
        slots, latents = data.draw(stores(layout))
        store_latents(pages, layout, slots, latents)
        last |= {slot: tuple(x[i] for x in latents) for i, slot in enumerate(slots.tolist()) if slot >= 0}

    # The same pages, if every slot had been written once, alone and in another order.
    expected = torch.full_like(storage, POISON)
    for slot in sorted(last):
        latents = tuple(x.unsqueeze(0) for x in last[slot])
        store_latents(expected[:, : layout.page_bytes], layout, torch.tensor([slot]), latents)
    # Which of the many NaNs a minimum is depends on how many numbers torch compares at once.
    if not any(x.isnan().any() for latents in last.values() for x in latents):
        assert torch.equal(storage, expected)

    for index, stream in enumerate(layout.streams):
        if not last:
            break
        slots = torch.tensor([*last])
        read = load_slots(pages, layout, slots, index)
        assert_same(read, once(stream, torch.stack([latents[index] for latents in last.values()])))
        whole = load_latents(pages, layout, torch.arange(BLOCKS), index)
        assert_same(whole[slots], read)

    # And what is in no slot that was written, whatever was.
    slots = torch.tensor([*last], dtype=torch.int64)
    zeros = [torch.zeros(len(last), s.num_heads, s.width) for s in layout.streams]
    for memory in (storage, expected):
        store_latents(memory[:, : layout.page_bytes], layout, slots, tuple(zeros))
    assert torch.equal(storage, expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), stream=streams())
def test_numbers_stay_numbers(data, stream) -> None:
    """What is finite reads back finite, and within half a step of where it was as far as FP16 goes."""
    largest = data.draw(st.sampled_from((1.0, 65504.0, 2.0**127)))
    numbers = st.floats(-largest, largest, width=32)
    values = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=6)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = values[torch.randint(len(values), (3, stream.num_heads, stream.width), generator=generator)]
    read = once(stream, x)
    assert read.isfinite().all()
    if isinstance(stream, AllocatedFormat) or not stream.quantized or largest > 65504:
        return
    x[..., : stream.outlier_channels] = read[..., : stream.outlier_channels]
    groups, back = x.unflatten(-1, (-1, stream.group_size)), read.unflatten(-1, (-1, stream.group_size))
    reach = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    size = groups.abs().amax(-1, keepdim=True)
    # Zero point and scale are FP16; a scale counts up to ``levels`` times.
    rounding = size * 2.0**-10 + reach * 2.0**-10 + 2.0**-24 * 2**stream.bits
    assert ((back - groups).abs() <= reach / (2**stream.bits - 1) / 2 + rounding).all()


@settings(max_examples=30, deadline=None)
@given(data=st.data(), layout=layouts())
def test_any_bytes_can_be_read(data, layout) -> None:
    """Pages of anything at all: reading neither fails nor looks at other blocks."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    pages = torch.randint(256, (BLOCKS, layout.page_bytes), dtype=torch.uint8, generator=generator)
    others = pages.clone()
    others[0] = POISON
    others[2:] = POISON
    for index, stream in enumerate(layout.streams):
        read = load_latents(pages, layout, torch.tensor([1]), index)
        assert read.shape == (layout.block_size, stream.num_heads, stream.width)
        assert_same(load_latents(others, layout, torch.tensor([1]), index), read)
