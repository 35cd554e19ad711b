"""Rows of runs as fields of one width: times their matrices they are the product of codes less their middles."""

import random

import pytest
import torch

from benchmarks.gpu.cases import random_runs
from xquant_vllm.attention.gpu.tables import run_fields
from xquant_vllm.attention.gpu.tables.run_fields import (
    CONSTANT,
    FieldFormat,
    key_fields,
    key_format,
    merged_fields,
    run_table,
    value_format,
    window_of_ones,
)
from xquant_vllm.codec.allocated import AllocatedFormat, channel_tables
from xquant_vllm.codec.allocation import Runs, run_bytes
from xquant_vllm.codec.packing import pack

WIDTH, COLUMNS, TOKENS = 128, 32, 5


def _stream(seed: int) -> AllocatedFormat:
    choose = random.Random(seed)
    return AllocatedFormat(WIDTH, tuple(random_runs(choose, WIDTH) for _ in range(3)))


def _packed(runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes less their middles, FP32 ``[TOKENS, channels]``, and the rows of their bytes."""
    codes, rows = [], []
    for bits, channels in runs:
        codes.append(torch.randint(1 << bits, (TOKENS, channels)))
        rows.append(pack(codes[-1], bits))
    _, largest, _ = channel_tables(runs)
    return torch.cat(codes, 1) - largest / 2, torch.cat(rows, 1)


def _numbers(rows: torch.Tensor, runs: Runs, form: FieldFormat, behind: int) -> torch.Tensor:
    """Fields as the kernel has them, ``[TOKENS, form.number]``; behind a row there is something else."""
    first, count = window_of_ones(runs)

    def read(part: torch.Tensor, units: int, mask: int) -> torch.Tensor:
        padded = torch.full((TOKENS, 2 * units), 0, dtype=torch.uint8)
        padded[:, : part.shape[1]] = part
        if part.shape[1] < 2 * units:
            padded[:, part.shape[1]] = 0x5A
        if behind and mask == 0xFFFF:
            padded[:, -4:] = torch.tensor([behind >> 8 * i & 0xFF for i in range(4)], dtype=torch.uint8)
        return padded.view(torch.int16).int() & mask

    def pieces(units: torch.Tensor, bits: int) -> torch.Tensor:
        found = []
        for piece in range(16 // bits):
            of_place = ((1 << bits) - 1) << bits * (piece // 2)
            found.append(units >> 8 * (piece % 2) & of_place)
        return torch.cat(found, 1)

    found = [pieces(part, form.bits) for part in read(rows, sum(form.parts), 0xFFFF).split(form.parts, 1)]
    if form.ones:
        found.append(pieces(read(rows[:, first : first + count], form.ones, 0xAAAA), 2))
    return torch.cat(found, 1).float()


@pytest.mark.parametrize("seed", range(12))
def test_keys(seed: int) -> None:
    torch.manual_seed(seed)
    stream = _stream(seed)
    up = torch.randn(3, WIDTH, COLUMNS)
    form = key_format(stream)
    met, counted = key_fields(stream, up, 30000.0)
    assert met.shape == (3, form.number, COLUMNS)
    assert met.isfinite().all()
    for head, runs in enumerate(stream.runs):
        codes, rows = _packed(runs)
        step, _, _ = channel_tables(runs)
        expected = (codes * step) @ up[head, : step.numel()]
        found = _numbers(rows, runs, form, CONSTANT) @ met[head].float() * counted[head]
        assert (found - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_values(seed: int, folded: bool) -> None:
    torch.manual_seed(seed)
    stream = _stream(seed)
    up = None if folded else torch.randn(3, WIDTH, COLUMNS)
    columns = WIDTH if folded else COLUMNS
    form = value_format(stream)
    merged = merged_fields(stream, up, columns, torch.bfloat16, torch.device("cpu"))
    assert merged.parts * merged.width == form.number
    assert merged.are_codes == folded
    for head, runs in enumerate(stream.runs):
        codes, rows = _packed(runs)
        step, _, _ = channel_tables(runs)
        if up is None:
            expected = torch.nn.functional.pad(2 * codes, (0, columns - step.numel()))
        else:
            expected = (codes * step) @ up[head, : step.numel()]
        found = _numbers(rows, runs, form, 0) @ merged.up[head].float() + merged.up_sum[head]
        assert (found - expected).norm() <= (0 if folded else 1e-2) * expected.norm()


def test_formats() -> None:
    """Fields are as wide as the narrowest plane, but for single bits; rows of keys have room for the constant."""
    wide = AllocatedFormat(128, (((8, 4), (4, 32)), ((4, 8),)))
    assert key_format(wide) == FieldFormat(bits=4, parts=(16, 0, 0), ones=0)
    threes = AllocatedFormat(128, (((8, 4), (3, 40)), ((2, 128),)))
    assert key_format(threes) == FieldFormat(bits=2, parts=(16, 8, 0), ones=4)
    assert value_format(threes) == FieldFormat(bits=2, parts=(16, 0, 0), ones=8)
    wide = AllocatedFormat(128, (((8, 128),), ((3, 8),)))
    assert [key_format(wide).parts, value_format(wide).parts] == [(32, 32, 8), (32, 32, 0)]
    assert window_of_ones(threes.runs[0]) == (4 + 10, 5)
    assert window_of_ones(threes.runs[1]) == (0, 0)


def test_where_heads_are() -> None:
    stream = AllocatedFormat(64, (((4, 8), (3, 8)), ((2, 4),)))
    assert run_table(stream, 160, 480, 16).tolist() == [[160, 7, 480, 6, 1], [160 + 16 * 7, 1, 496, 0, 0]]
    assert run_bytes(stream.runs[0]) == 7
    assert run_fields.stored(stream.runs[0]) == 16
