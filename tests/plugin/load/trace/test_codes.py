"""Codes of rows: exact in every dtype, and nothing else than a row is taken for one."""

import pytest
import torch

from xquant_vllm.plugin.load.trace.codes import TOKENS, RowCodes

ROWS = {"qkv_proj": 70_000, "gate": 300, "k_proj": 513}


@pytest.fixture(scope="module")
def codes():
    return RowCodes(ROWS, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_read_in_any_order_in_every_dtype(codes, dtype):
    for path, number in ROWS.items():
        rows = torch.randperm(number)
        read = codes.read(codes.of(path)[:, rows].to(dtype))
        assert torch.equal(read, codes.numbers(path, rows))
        ((owner, own),) = codes.owners(read).items()
        assert owner == path
        assert torch.equal(own, rows)


def test_rows_of_several_layers_are_told_apart(codes):
    rows = torch.tensor([5, 0, 7])
    numbers = torch.cat([codes.numbers("gate", rows), codes.numbers("k_proj", rows[:2])])
    owners = codes.owners(codes.read(torch.cat([codes.of("gate")[:, rows], codes.of("k_proj")[:, rows[:2]]], 1)))
    assert torch.equal(codes.read(torch.cat([codes.of("gate")[:, rows], codes.of("k_proj")[:, rows[:2]]], 1)), numbers)
    assert {path: own.tolist() for path, own in owners.items()} == {"gate": [5, 0, 7], "k_proj": [5, 0]}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * torch.linspace(2, 3, x.shape[1]),
        lambda x: x + 1e-3,
        lambda x: x + x.roll(1, 1),
        lambda x: x.roll(1, 0),
        lambda x: x.clamp(-8, 8),
        lambda x: x.clamp(-400, 400),
        torch.relu,
        torch.nn.functional.silu,
        torch.tanh,
        torch.zeros_like,
        torch.randn_like,
        lambda x: x * torch.nan,
        lambda x: x + torch.inf,
    ],
)
def test_what_is_no_row_is_not_read_as_one(codes, change):
    assert (codes.read(change(codes.of("qkv_proj"))) == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [-1.0, 0.0078125, 0.0712, 1.01, 1.9])
def test_a_common_factor_is_told(codes, dtype, factor):
    rows = torch.randperm(ROWS["qkv_proj"])
    scaled = codes.of("qkv_proj")[:, rows].to(dtype) * factor
    assert codes.factor(scaled) == pytest.approx(factor, rel=0.01)
    assert torch.equal(codes.read(scaled, codes.factor(scaled)), rows)
    assert (codes.read(scaled) == -1).all()


def test_factors_of_single_channels_are_none(codes):
    scaled = codes.of("gate").clone()
    scaled[:, 7] *= 2
    assert codes.factor(scaled) is None


def test_another_ranks_rows_are_nobodys(codes):
    assert (RowCodes(ROWS, seed=1).read(codes.of("qkv_proj")) == -1).all()


def test_more_rows_than_there_are_numbers():
    with pytest.raises(ValueError, match="cannot be numbered"):
        RowCodes({"huge": 32**4 + 1}, seed=0)


def test_tokens_are_as_many_as_said(codes):
    assert codes.of("gate").shape == (TOKENS, 300)
