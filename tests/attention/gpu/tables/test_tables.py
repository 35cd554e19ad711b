"""What the host makes for the Triton kernels: tables, workspace. No kernel runs."""

import random

import pytest
import torch

from tests.attention.attention_cases import make_plan, random_runs, random_spec
from xquant_vllm.attention.gpu import tiling, workspace
from xquant_vllm.attention.gpu.tables.bit_addresses import bit_addresses
from xquant_vllm.attention.gpu.tables.code_bytes import code_bytes
from xquant_vllm.attention.gpu.tables.latent_tables import latent_bands
from xquant_vllm.attention.gpu.tables.pairs import arranged, pair_columns
from xquant_vllm.attention.gpu.tables.stream_tables import FIELDS, stream_tables
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.packing import pack
from xquant_vllm.projection.rope import RotaryTable

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(10))
def test_bit_addresses(seed: int) -> None:
    choose = random.Random(seed)
    runs = random_runs(choose, 64) if seed else ((16, 24), (8, 8), (3, 16))
    codes = [torch.randint(1 << bits, (channels,)) for bits, channels in runs]
    codes = [
        code.to(torch.int16).view(torch.float16) if bits == 16 else code
        for code, (bits, _) in zip(codes, runs, strict=True)
    ]
    row = torch.cat([pack(code, bits) for code, (bits, _) in zip(codes, runs, strict=True)]).int()
    low, low_mask, high, high_mask, high_shift, _ = bit_addresses(runs, first_byte=0)
    read = ((row[low // 8] >> low % 8) & low_mask) | (((row[high // 8] >> high % 8) & high_mask) << high_shift)
    exact = [code.view(torch.int16).int() & 0xFFFF if code.dtype == torch.float16 else code.int() for code in codes]
    assert torch.equal(read, torch.cat(exact))


@pytest.mark.parametrize("seed", range(10))
def test_code_bytes(seed: int) -> None:
    """Inverts the bit addresses: every bit of a row's codes is in one byte."""
    runs = random_runs(random.Random(seed), 64) if seed else ((16, 24), (8, 8), (3, 16))
    numbers = torch.cat([torch.randint(1 << bits, (channels,)) for bits, channels in runs]).tolist()
    row = []
    for first, stride, bits, shift in code_bytes(runs).T.tolist():
        parts = (numbers[first + i * stride] >> shift & (1 << bits) - 1 for i in range(8 // bits))
        row.append(sum(part << i * bits for i, part in enumerate(parts)))
    bytes_of_row = torch.tensor(row)
    low, low_mask, high, high_mask, high_shift, _ = bit_addresses(runs)
    read = (bytes_of_row[low // 8] >> low % 8) & low_mask
    read |= ((bytes_of_row[high // 8] >> high % 8) & high_mask) << high_shift
    assert read.tolist() == numbers


@pytest.mark.parametrize("seed", range(10))
def test_bands_cover_a_latent(seed: int) -> None:
    """Every channel that is stored is in one band, once for every term that has it; bands have one scale each."""
    plan = make_plan(random_spec(seed))
    for terms in (plan.key_terms, plan.value_terms):
        for head in range(plan.projection.num_kv_heads):
            bands = latent_bands(plan.layouts, terms, head, 32)
            assert all(band.addresses.shape[1] == band.fields["channels"] <= 32 for band in bands)
            rows = [band.first_row + i for band in bands for i in range(band.fields["channels"])]
            expected, first, before = [], 0, 0
            for term in terms:
                stream = plan.layouts[term.page].streams[term.stream]
                if not term.adds:
                    first, before = first + before, stream.width
                of_head = head if stream.num_heads > 1 else 0
                stored = stream.width
                if isinstance(stream, AllocatedFormat):
                    stored = sum(channels for _, channels in stream.runs[of_head])
                expected += range(first, first + stored)
            assert rows == expected


@pytest.mark.parametrize("seed", range(10))
def test_scale_groups_cover_a_stream(seed: int) -> None:
    """Scale groups follow each other, and none shares a scale with another."""
    layout = make_plan(random_spec(seed)).layout
    for index, stream in enumerate(layout.streams):
        groups = stream_tables(layout, index, CPU).scale_groups
        first, channels, scales = (groups[:, FIELDS.index(name)].tolist() for name in ("first", "channels", "scales"))
        assert len(set(scales)) == len(scales) or getattr(stream, "bits", 0) == 16
        if isinstance(stream, AllocatedFormat):
            assert first == [head * stream.width for head in range(stream.num_heads)]
            assert channels == [sum(count for _, count in runs) for runs in stream.runs]
        else:
            assert first == list(range(0, stream.num_heads * stream.width, stream.group_size))
            assert set(channels) == {stream.group_size}


@pytest.mark.parametrize("rotary", [0, 2, 32, 80])
@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs(rotary: int, interleaved: bool) -> None:
    rope = RotaryTable(torch.ones(4, rotary // 2), torch.zeros(4, rotary // 2), interleaved) if rotary else None
    columns = pair_columns(80, rope)
    assert sorted(columns[columns >= 0].tolist()) == list(range(80))
    low, high = columns.view(2, -1)
    assert low.numel() == 64
    for pair in range(rotary // 2):
        expected = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary // 2)
        assert (low[pair], high[pair]) == expected
    x = torch.randn(3, 80)
    found = arranged(x, columns)
    assert (found[:, columns < 0] == 0).all()
    assert torch.equal(found[:, columns >= 0], x[:, columns[columns >= 0].long()])


def test_workspace() -> None:
    workspace.release(CPU)
    parts = (((3, 5), torch.float32), ((7,), torch.bfloat16))
    workspace.reserve(CPU, workspace.bytes_of(*parts))
    first, second = workspace.take(CPU, *parts)
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    workspace.fix(CPU)
    assert workspace.take(CPU, *parts)[0].data_ptr() == first.data_ptr()
    with pytest.raises(RuntimeError, match="workspace, but only"):
        workspace.take(CPU, ((10000,), torch.float32))
    workspace.release(CPU)


@pytest.mark.parametrize(("group", "kv_heads"), [(3, 3), (4, 8), (48, 1), (1, 32), (80, 2)])
@pytest.mark.parametrize("tokens", [7, 100])
def test_reserved_splits(group: int, kv_heads: int, tokens: int) -> None:
    """No batch needs more, however many sequences and query tokens it has; and some need nearly as much."""
    reserved, most = tokens * tiling.most_splits(group, kv_heads, tokens), 0
    for sequences in range(1, tokens + 1):
        for longest in range(1, tokens + 1):
            for decode_tokens in (1, 5, 100):
                splits = tiling.shape_of(group, kv_heads, sequences, longest, decode_tokens)[2]
                most = max(most, min(tokens, sequences * longest) * splits)
    assert reserved / 2 - tokens <= most <= reserved


def test_tiles_are_few() -> None:
    """Kernels are compiled for them."""
    for group, decode_tokens in ((1, 1), (4, 6), (8, 41), (48, 2)):
        found = {tiling.shape_of(group, 2, n, t + 1, decode_tokens)[0] for n in (1, 9) for t in range(decode_tokens)}
        assert len(found) <= 2
