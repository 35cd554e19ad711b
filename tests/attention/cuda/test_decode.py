"""The CUDA decode kernel, run by the emulation, against the reference."""

import random
from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Case, Spec, make_case
from xquant_vllm.attention import reference

pytest.importorskip("triton")
from xquant_vllm.attention.gpu import cuda_decode, cuda_tables
from xquant_vllm.attention.gpu.attend import Partial
from xquant_vllm.attention.gpu.prepared import PreparedPlan

# Keys and weights are rounded to the query's dtype and to FP16; of a row's largest element.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def run(library, case: Case, splits: int, order: int = 0) -> torch.Tensor:
    """Output of the kernel and of a merge in FP64, ``[tokens, num_heads, head_size]``."""
    plan = case.plan
    prepared = PreparedPlan(plan, case.query.dtype)
    tokens, heads, group = case.query.shape[0], plan.num_heads, plan.num_heads // plan.projection.num_kv_heads
    starts = case.batch.query_start_loc
    rows = int((starts[1:] - starts[:-1]).max()) * group
    assert cuda_decode.decode_plan(prepared) is not None
    partial = Partial(
        torch.full((tokens, heads, splits, prepared.value.width), torch.nan),
        torch.full((tokens, heads, splits, 3), torch.nan),
    )
    library.xquant_emulation_order(order)
    cuda_decode.attend(prepared, case.query, case.pages, case.batch, partial, rows, library)
    return merge(prepared, partial, int(starts[-1]))


def merge(prepared: PreparedPlan, partial: Partial, tokens: int) -> torch.Tensor:
    plan, value = prepared.plan, prepared.value
    projection, group = plan.projection, plan.num_heads // plan.projection.num_kv_heads
    sums, stats = partial.sums[:tokens].double(), partial.stats[:tokens].double()
    largest = stats[..., 0]
    assert not largest.isnan().any()
    there = largest > -torch.inf
    factor = torch.where(there, (largest - largest.amax(-1, keepdim=True)).exp(), 0.0)
    stats = torch.where(there[..., None], stats, 0.0)
    sums = (factor[..., None] * torch.where(there[..., None], sums, 0.0)).sum(2)
    zeros, total = ((factor * stats[..., index]).sum(2, keepdim=True) for index in (2, 1))
    result = torch.empty(tokens, plan.num_heads, 2 * prepared.half, dtype=torch.float64)
    # In FP32, whatever the operands' dtype: that is the merge kernel's business.
    exact = PreparedPlan(plan, torch.float32).value
    for head in range(plan.num_heads):
        chunk = int(value.first_chunk[head // group])
        up, of_zero = exact.up[chunk].double(), exact.up_sum[chunk].double()
        result[:, head] = (sums[:, head] @ up + zeros[:, head] * of_zero) / total[:, head]
        if projection.value_bias is not None:
            result[:, head] += prepared.value_bias[head // group].double()
    out = torch.empty(tokens, plan.num_heads, projection.head_size, dtype=torch.float64)
    out[..., prepared.value_columns[prepared.value_columns >= 0].long()] = result[..., prepared.value_columns >= 0]
    return out


def assert_close(actual: torch.Tensor, case: Case) -> float:
    """Returns the largest error relative to its row's largest element."""
    exact = replace(case, query=case.query.float())
    expected = exact.run(reference)[: actual.shape[0]].double()
    assert actual.isfinite().all()
    error = ((actual - expected).abs() / expected.abs().amax(-1, keepdim=True)).max().item()
    assert error <= TOLERANCE[case.query.dtype], f"off by {error:.2e} of a row's largest element"
    return error


def random_decode(seed: int) -> tuple[Spec, int]:
    """A call that the kernel takes, and the number of splits."""
    choose = random.Random(1000 + seed)
    head_size = choose.choice((64, 64, 128))
    group = choose.choice((1, 2, 3, 4, 5, 7, 8))
    most = 16 // group
    seqs = []
    for _ in range(choose.randint(1, 3)):
        new = choose.randint(0, most) if seqs and choose.random() < 0.4 else choose.choice((1, 1, most))
        seqs.append((new + choose.choice((0, choose.randint(0, 70), choose.randint(60, 300))), new))
    bits = (8, 4, 4, 3, 2)
    spec = Spec(
        seqs=tuple(seqs),
        kv_heads=choose.randint(1, 2),
        group=group,
        head_size=head_size,
        key_bits=choose.choice(bits),
        value_bits=choose.choice(bits),
        key_group=head_size,
        value_group=head_size,
        key_outliers=choose.choice((0, 1, 1, 4)),
        allocated=choose.choice((0.0, 0.5, 1.0)),
        block_size=choose.choice((16, 16, 32, 48, 64, 128)),
        dtype=choose.choice((torch.bfloat16, torch.bfloat16, torch.float16)),
        bias=choose.random() < 0.4,
        rope=choose.choice(("neox", "neox", "interleaved")),
        rotary_size=choose.choice((None, None, head_size // 2)),
        window=choose.choice((None, None, 1, 7, 64, 100)),
        soft_cap=choose.choice((None, None, 20.0)),
        strided=choose.random() < 0.5,
        seed=seed,
    )
    return spec, choose.choice((1, 1, 2, 3, 7))


@pytest.mark.parametrize("seed", range(40))
def test_random(library, seed: int) -> None:
    spec, splits = random_decode(seed)
    print(spec)
    case = make_case(spec)
    output = run(library, case, splits)
    print(f"error {assert_close(output, case):.1e}")
    # Bits that depend on which thread runs first are a race.
    for order in (1, 2 + seed):
        assert torch.equal(output, run(library, case, splits, order))
