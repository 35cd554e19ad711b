"""The CUDA store kernels, run by the emulation, against the reference."""

import random

import pytest
import torch

from tests.attention.attention_cases import Spec, make_plan, random_latents, random_runs
from xquant_vllm.attention import reference
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat, channel_tables
from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.codec.pages import load_slots

pytest.importorskip("triton")
from xquant_vllm.attention.gpu.cuda import store as cuda_store

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_slots(choose: random.Random, tokens: int, block_size: int) -> tuple[torch.Tensor, int]:
    """Distinct slots, some of padding, and the number of blocks."""
    blocks = -(-tokens // block_size) + 2
    slots = choose.sample(range(blocks * block_size), tokens)
    return torch.tensor([-1 if choose.random() < 0.1 else slot for slot in slots]), blocks


def both(library, plan: AttentionLayerPlan, inputs, slots: torch.Tensor, blocks: int, order: int = 0):
    """Pages that the kernel has written, and pages that the reference has."""
    pages = [torch.full((blocks, plan.layout.page_bytes + 32), 0xEE, dtype=torch.uint8) for _ in range(2)]
    pages = [of[:, : plan.layout.page_bytes] for of in pages]
    assert cuda_store.does(plan)
    library.xquant_emulation_order(order)
    cuda_store.store(pages[:1], plan, slots, inputs, library)
    reference.store(pages[1:], plan, slots, inputs)
    return pages


@pytest.mark.parametrize("seed", range(30))
def test_uniform_latents(library, seed: int) -> None:
    choose = random.Random(seed)
    width = choose.choice((16, 24, 64, 128, 192))
    groups = [size for size in range(8, width + 1, 8) if width % size == 0]
    streams = []
    for _ in range(choose.randint(1, 2)):
        bits, group = choose.choice((2, 3, 4, 8, 16)), choose.choice(groups)
        outliers = 0 if bits == 16 else choose.choice((0, 1, 3))
        streams.append(StreamFormat(choose.randint(1, 3), width, bits, group, outliers))
    plan = _plan(streams, choose)
    tokens = choose.randint(1, 12)
    dtype = choose.choice(DTYPES)
    inputs = [x.to(dtype) for x in random_latents(plan.layout, tokens, torch.Generator().manual_seed(seed))]
    if choose.random() < 0.5:
        _spoil(choose, inputs)
    if choose.random() < 0.5:
        inputs = [torch.nn.functional.pad(x, (3, 5))[:, 3:-5] for x in inputs]
    slots, blocks = random_slots(choose, tokens, plan.layout.block_size)
    actual, expected = both(library, plan, inputs, slots, blocks, seed)
    # The sign of a NaN or of a zero may differ.
    assert _same(actual, expected, plan.layout)


def _plan(streams, choose: random.Random) -> AttentionLayerPlan:
    """A plan to store by, with nothing to read."""
    plan = object.__new__(AttentionLayerPlan)
    layout = PageLayout(tuple(streams), choose.choice((16, 32, 48)))
    for name, what in {"layouts": (layout,), "rotation": None, "prediction": None}.items():
        object.__setattr__(plan, name, what)
    return plan


def _spoil(choose: random.Random, inputs) -> None:
    for x in inputs:
        for what in (torch.nan, torch.inf, -torch.inf, 7e4, 1e-7):
            x[choose.randrange(x.shape[0]), choose.randrange(x.shape[1])] = what
        x[choose.randrange(x.shape[0])] = 3.25  # constant groups


def _same(actual: torch.Tensor, expected: torch.Tensor, layout: PageLayout) -> bool:
    """Whether pages are the same, scales, zeros and outliers as numbers."""
    codes = layout.block_size * sum(stream.code_bytes for stream in layout.streams)
    first = actual[:, :codes], expected[:, :codes]
    if any(stream.bits == 16 for stream in layout.streams):
        first = tuple(x.view(torch.float16).nan_to_num(77) for x in first)
    second = (x[:, codes:].contiguous().view(torch.float16).nan_to_num(77) for x in (actual, expected))
    return torch.equal(*first) and torch.equal(*second)


@pytest.mark.parametrize("seed", range(20))
def test_allocated_latents(library, seed: int) -> None:
    choose = random.Random(100 + seed)
    width, heads = choose.choice((24, 64, 128, 320)), choose.randint(1, 3)
    stream = AllocatedFormat(width, tuple(random_runs(choose, width) for _ in range(heads)))
    plan = _plan([stream], choose)
    tokens = choose.randint(1, 12)
    generator = torch.Generator().manual_seed(seed)
    inputs = [x.to(choose.choice(DTYPES)) for x in random_latents(plan.layout, tokens, generator)]
    if seed % 3 == 0:
        inputs = [x * 10 ** torch.linspace(-12, 12, tokens)[:, None].to(x.dtype) for x in inputs]
    if seed % 4 == 0:
        _spoil(choose, inputs)
    slots, blocks = random_slots(choose, tokens, plan.layout.block_size)
    actual, expected = both(library, plan, inputs, slots, blocks, seed)
    unlike = (actual != expected).float().mean().item()
    print(f"{unlike:.1e} of the bytes differ")
    # Two scales with nearly the same error may change places.
    kept = slots >= 0
    x = inputs[0][kept].float().view(-1, heads, width)
    errors = [
        _weighted_error(x, load_slots(pages, plan.layout, slots[kept], 0), stream) for pages in (actual, expected)
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())
    assert unlike < 0.05


def _weighted_error(x: torch.Tensor, read: torch.Tensor, stream: AllocatedFormat) -> torch.Tensor:
    per_head = []
    for head, runs in enumerate(stream.runs):
        _, _, worth = channel_tables(runs)
        missed = x[:, head].nan_to_num(0.0, 3e38, -3e38).double() - read[:, head].double()
        per_head.append((missed[:, : worth.numel()].square() * worth).sum(-1))
    return torch.stack(per_head)


@pytest.mark.parametrize("hidden_size", [64, 72, 512, 1024, 192, 320, 576, 2048])
@pytest.mark.parametrize("bits", [3, 4])
def test_rotated(library, hidden_size: int, bits: int) -> None:
    choose = random.Random(hidden_size + bits)
    group = choose.choice([size for size in (8, 24, 32, 64, 96, 128) if hidden_size % size == 0])
    spec = Spec(
        kind="x", hidden_size=hidden_size, key_bits=bits, key_group=group, key_outliers=choose.choice((0, 1)), seed=3
    )
    plan = make_plan(spec)
    inputs = random_latents(plan.layout, 5, torch.Generator().manual_seed(1))
    inputs = [x.to(choose.choice(DTYPES)) for x in inputs]
    slots, blocks = random_slots(choose, 5, plan.layout.block_size)
    actual, expected = both(library, plan, inputs, slots, blocks, bits)
    if plan.rotation.block == hidden_size:
        assert torch.equal(actual, expected)
        return
    # Sums over blocks differ in their last bits; now and then a code is another by one.
    kept = slots[slots >= 0]
    read = [load_slots(pages, plan.layout, kept, 0) for pages in (actual, expected)]
    assert (actual != expected).float().mean() < 0.01
    assert (read[0] - read[1]).abs().max() < 1.1 * (read[1].amax(-1) - read[1].amin(-1)).max() / (2**bits - 1)
