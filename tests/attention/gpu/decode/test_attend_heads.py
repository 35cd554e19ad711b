"""The decode kernel for latents per head, under Triton's interpreter, against the FP32 reference and ``attend``."""

import random
from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Case, Spec, make_case
from xquant_vllm.attention import reference
from xquant_vllm.attention.gpu import launch, workspace
from xquant_vllm.attention.gpu.gpu_plan import prepare

HALF = torch.float16


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def attended(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel and by the reference in FP32; padding is left alone, and the workspace is full of NaN before."""
    workspace.take(torch.device("cpu"), ((1 << 24,), torch.uint8))[0].fill_(0xFF)
    assert prepare(case.plan, HALF).general_because is None
    tokens = int(case.batch.query_start_loc[-1])
    output = case.run(launch)
    assert (output[tokens:] == 77).all()
    expected = replace(case, query=case.query.float()).run(reference)
    return output[:tokens], expected[:tokens]


def sized(channels: int, **others) -> Spec:
    return Spec(head_size=channels, key_group=channels, value_group=channels, dtype=HALF, **others)


SPECS = {
    "served": sized(128, seqs=((150, 1), (33, 1)), kv_heads=1, group=4, folded=True),
    "2 bits of keys, 8 of values": sized(64, seqs=((70, 1),), key_bits=2, value_bits=8, key_outliers=0),
    "8 bits of keys, 2 of values": sized(128, seqs=((70, 1),), kv_heads=1, key_bits=8, value_bits=2),
    "heads of 80": sized(80, seqs=((70, 1),), bias=True, strided=True, block_size=48, group=1),
    "drafted tokens": sized(96, seqs=((70, 4), (3, 3)), kv_heads=1, soft_cap=20.0, group=16, bias=True),
    "window": sized(64, seqs=((270, 4), (100, 3)), window=37, kv_heads=1, rope="interleaved", rotary_size=32),
    "window, one token": sized(64, seqs=((270, 1), (65, 1)), window=70, kv_heads=1, sinks=True),
    "many splits": sized(64, seqs=((700, 1), (1, 1)), kv_heads=1, group=8),
    "3 bits": sized(128, seqs=((150, 1), (33, 1)), kv_heads=1, group=4, key_bits=3, value_bits=3, folded=True),
    "3 bits, up-projected": sized(80, seqs=((70, 4),), kv_heads=1, key_bits=3, value_bits=3),
    "norm": sized(128, seqs=((150, 1), (33, 1)), kv_heads=2, group=4, folded=True, norm=True),
    "norm, 3 bits, drafted tokens": sized(80, seqs=((70, 4),), key_bits=3, norm=True, rope="interleaved"),
    "norm, calibrated": sized(64, seqs=((70, 1), (3, 1)), allocated=1.0, folded=True, norm=True, seed=5),
    # Runs of 2 to 8 bits, of which rows have odd numbers of bytes.
    "calibrated": sized(64, seqs=((150, 1), (33, 1)), allocated=1.0, folded=True, seed=3),
    "calibrated, up-projected": sized(64, seqs=((70, 4), (3, 3)), allocated=1.0, bias=True, strided=True, seed=4),
    # Rows of three parts, of which the last may have nothing to read.
    "calibrated, long keys": sized(128, seqs=((70, 1),), kv_heads=1, allocated=1.0, folded=True, seed=9),
    "calibrated, long values": sized(128, seqs=((70, 1),), kv_heads=1, group=4, allocated=1.0, seed=7),
}


@pytest.mark.parametrize("name", SPECS)
def test_special(name: str) -> None:
    output, expected = attended(make_case(SPECS[name]))
    assert error(output, expected) <= 2e-3


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(60))
def test_random(seed: int) -> None:
    choose = random.Random(seed)
    channels = choose.choice((8, 16, 24, 64, 72, 80, 96, 128))
    some = (2, 3, 4, 8) if channels % 16 == 0 else (2, 4, 8)
    new = choose.choice(((1,), (1, 0), (1, 2, 3, 5)))
    seqs = [(choose.choice((0, choose.randint(0, 300))) + count, count) for count in choose.choices(new, k=3)]
    spec = sized(
        channels,
        seqs=(*seqs, (5, 1)),
        kv_heads=choose.randint(1, 3),
        group=choose.choice((1, 2, 3, 4, 7, 8, 16)),
        key_bits=choose.choice(some),
        value_bits=choose.choice(some),
        key_outliers=choose.randint(0, 1),
        block_size=choose.choice((16, 32, 48, 64, 128)),
        bias=choose.random() < 0.3,
        norm=choose.random() < 0.3,
        rope=choose.choice(("neox", "interleaved")),
        rotary_size=choose.choice((None, channels // 2, 2)),
        window=choose.choice((None, None, 1, 7, 64, 100)),
        soft_cap=choose.choice((None, None, 20.0)),
        strided=choose.random() < 0.5,
        sinks=choose.random() < 0.3,
        folded=choose.random() < 0.5,
        allocated=choose.choice((0.0, 1.0)),
        seed=seed,
    )
    spec = replace(spec, bias=spec.bias and not spec.norm)
    print(spec)
    output, expected = attended(make_case(spec))
    # Codes that are not centred, and have single bits which are differences.
    coarse = spec.key_bits == 3 and not spec.key_outliers
    assert error(output, expected) <= (4e-3 if coarse else 2e-3)


@pytest.mark.nightly
def test_as_exact_as_the_general_kernel() -> None:
    """Codes, zero points and outliers meet the scores apart; what rounding leaves of it is no more than elsewhere."""
    case = make_case(SPECS["served"])
    output, expected = attended(case)
    prepare(case.plan, HALF).heads = None
    tokens = expected.shape[0]
    assert error(output, expected) <= 1.5 * error(case.run(launch)[:tokens], expected)


@pytest.mark.parametrize("outlier", [0.0, 900.0])
@pytest.mark.parametrize("scale", [0.0, 2.0**-24])
@pytest.mark.parametrize("folded", [False, True])
def test_values_of_one_number(folded: bool, scale: float, outlier: float) -> None:
    """A scale of next to nothing: the latent is its zero point, and a large outlier, in keys and in values."""
    case = make_case(sized(64, seqs=((20, 1),), kv_heads=1, key_outliers=1, folded=folded))
    offsets, block = case.plan.layout.offsets, case.plan.layout.block_size
    for page in case.batch.block_table[0, :1].tolist():
        for index, of in enumerate(offsets):
            numbers = case.pages[0][page]
            numbers[of.codes + 32 * 3 : of.codes + 32 * 4] = 0
            numbers[of.scales : of.zeros].view(torch.float16)[3] = scale
            assert of.scales + 2 * block == of.zeros
            if index == 0:
                numbers[of.outliers : of.outliers + 2 * block].view(torch.float16)[3] = outlier
    output, expected = attended(case)
    assert error(output, expected) <= 2e-3


def test_large_queries() -> None:
    """FP16 has no room for the products of such queries; softmax is then one token's."""
    case = make_case(sized(64, seqs=((70, 1),), kv_heads=1))
    case = replace(case, query=case.query * 8000)
    assert case.query.isfinite().all()
    output, expected = attended(case)
    assert error(output, expected) <= 2e-3
