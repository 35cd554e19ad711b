"""The CUDA decode kernel, run by the emulation, against the reference."""

import ctypes
import random
from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Case, Spec, make_case, make_plan, random_runs
from tests.attention.integer_case import on_integers
from xquant_vllm.attention import reference

pytest.importorskip("triton")
from xquant_vllm.attention.gpu.cuda import decode as cuda_decode
from xquant_vllm.attention.gpu.cuda import keys as cuda_keys
from xquant_vllm.attention.gpu.cuda import library as cuda_library
from xquant_vllm.attention.gpu.cuda.keys import key_factors
from xquant_vllm.attention.gpu.cuda.tables import quads
from xquant_vllm.attention.gpu.device.arguments import Partial
from xquant_vllm.attention.gpu.gpu_plan import GpuPlan, prepare
from xquant_vllm.attention.gpu.tables.bit_addresses import bit_addresses
from xquant_vllm.attention.gpu.tables.latent_tables import latent_bands
from xquant_vllm.attention.gpu.tables.tile_rotation import rope_arrays
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.projection.basis import LatentBasis
from xquant_vllm.projection.integer_up import with_integer_up
from xquant_vllm.projection.rope import RotaryTable

# Keys and weights are rounded to the query's dtype and to FP16; of a row's largest element.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
# As the kernel names them: what it rematerializes keys by.
FP16, INT8 = 1, 3


def key_type(case: Case) -> int:
    of_plan = cuda_decode.prepare(case.plan, case.query.dtype)
    assert of_plan is not None
    return of_plan.key_type


def run(library, case: Case, splits: int, order: int = 0) -> torch.Tensor:
    """Output of the kernel and of a merge in FP64, ``[tokens, num_heads, head_size]``."""
    plan = case.plan
    gpu_plan = prepare(plan, case.query.dtype)
    tokens, heads, group = case.query.shape[0], plan.num_heads, plan.num_heads // plan.projection.num_kv_heads
    starts = case.batch.query_start_loc
    rows = int((starts[1:] - starts[:-1]).max()) * group
    assert cuda_decode.prepare(plan, case.query.dtype) is not None
    partial = Partial(
        torch.full((tokens, heads, splits, gpu_plan.value.width), torch.nan),
        torch.full((tokens, heads, splits, 3), torch.nan),
    )
    library.xquant_emulation_order(order)
    cuda_decode.launch(plan, case.query, case.pages, case.batch, partial, case.batch.seq_lens.shape[0], rows, library)
    return merge(plan, gpu_plan, partial, int(starts[-1]))


def merge(plan: AttentionLayerPlan, gpu_plan: GpuPlan, partial: Partial, tokens: int) -> torch.Tensor:
    value = gpu_plan.value
    projection, group = plan.projection, plan.num_heads // plan.projection.num_kv_heads
    sums, stats = partial.sums[:tokens].double(), partial.stats[:tokens].double()
    largest = stats[..., 0]
    assert not largest.isnan().any()
    there = largest > -torch.inf
    factor = torch.where(there, (largest - largest.amax(-1, keepdim=True)).exp(), 0.0)
    stats = torch.where(there[..., None], stats, 0.0)
    sums = (factor[..., None] * torch.where(there[..., None], sums, 0.0)).sum(2)
    zeros, total = ((factor * stats[..., index]).sum(2, keepdim=True) for index in (2, 1))
    result = torch.empty(tokens, plan.num_heads, 2 * gpu_plan.half, dtype=torch.float64)
    # In FP32, whatever the operands' dtype: that is the merge kernel's business.
    exact = prepare(plan, torch.float32).value
    for head in range(plan.num_heads):
        band = int(value.first_band[head // group])
        up, of_zero = exact.up[band].double(), exact.up_sum[band].double()
        result[:, head] = (sums[:, head] @ up + zeros[:, head] * of_zero) / total[:, head]
        if projection.value_bias is not None:
            result[:, head] += gpu_plan.value_bias[head // group].double()
    out = torch.empty(tokens, plan.num_heads, projection.head_size, dtype=torch.float64)
    out[..., gpu_plan.value_columns[gpu_plan.value_columns >= 0].long()] = result[..., gpu_plan.value_columns >= 0]
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


@pytest.mark.parametrize("integers", [False, True], ids=["fp16", "int8"])
@pytest.mark.parametrize("seed", range(40))
def test_random(library, seed: int, integers: bool) -> None:
    spec, splits = random_decode(seed)
    print(spec)
    case = make_case(spec)
    if integers:
        case = on_integers(case)
    assert key_type(case) == (INT8 if integers else FP16)
    output = run(library, case, splits)
    print(f"error {assert_close(output, case):.1e}")
    # Bits that depend on which thread runs first are a race.
    for order in (1, 2 + seed):
        assert torch.equal(output, run(library, case, splits, order))


LARGE = {
    "long": (Spec(seqs=((1500, 1),), kv_heads=1, group=4, head_size=128, key_group=128, value_group=128), 3),
    "long window": (Spec(seqs=((1500, 2), (900, 1)), kv_heads=1, group=8, window=300, soft_cap=20.0), 2),
    "runs": (Spec(seqs=((400, 1),), kv_heads=2, group=4, head_size=128, allocated=1.0, seed=1), 2),
    "more splits than tiles": (Spec(seqs=((130, 1), (3, 1)), kv_heads=2, group=2), 32),
}


@pytest.mark.parametrize("name", LARGE)
def test_large(library, name: str) -> None:
    spec, splits = LARGE[name]
    case = make_case(replace(spec, dtype=torch.bfloat16))
    print(f"error {assert_close(run(library, case, splits), case):.1e}")


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_extreme_scores(library, scale: float) -> None:
    """All scores equal, and so far apart that most weights underflow."""
    case = make_case(Spec(seqs=((200, 2),), dtype=torch.float16, group=2))
    case = replace(case, plan=replace(case.plan, scale=scale))
    output = run(library, case, 2)
    if scale < 1:
        assert_close(output, case)
    assert output.isfinite().all()


STREAMS = {
    "4 bits": (StreamFormat(2, 64, 4, 64, 1), INT8),
    "3 bits": (StreamFormat(2, 64, 3, 64, 0), INT8),
    "2 bits": (StreamFormat(2, 64, 2, 64, 4), INT8),
    "8 bits": (StreamFormat(2, 64, 8, 64, 1), FP16),
    "runs of few bits": (AllocatedFormat(64, (((4, 20), (3, 24), (2, 12)), ((2, 4),))), INT8),
    "runs of many bits": (AllocatedFormat(64, (((8, 8), (6, 8)), ((6, 64),))), FP16),
    "a run of many bits": (AllocatedFormat(64, (((4, 64),), ((6, 4), (4, 60)))), FP16),
}


@pytest.mark.parametrize("name", STREAMS)
def test_key_type(name: str) -> None:
    """Integers are multiplied wherever a basis has them, and nowhere else."""
    stream, expected = STREAMS[name]
    case = make_case(Spec(dtype=torch.bfloat16))
    projection = case.plan.projection
    basis = with_integer_up(LatentBasis(torch.zeros(2, 1, 64), projection.up_key), stream)
    layout = PageLayout((stream, case.plan.layout.streams[1]), 16)
    plan = replace(case.plan, layouts=(layout,), projection=replace(projection, up_key=basis.up))
    assert key_type(replace(case, plan=plan)) == expected
    assert key_type(replace(case, plan=replace(plan, projection=projection))) == FP16


@pytest.mark.parametrize("allocated", [0.0, 1.0])
def test_integers_are_exact(allocated: float) -> None:
    """Codes meet the up-projection itself, but for its own rounding to FP32."""
    plan = on_integers(make_case(Spec(allocated=allocated))).plan
    bands = [latent_bands(plan.layouts, plan.key_terms, head, 1 << 16)[0] for head in range(2)]
    factors = key_factors(bands, plan.projection.up_key)
    assert factors.dtype == torch.int8
    for head, band in enumerate(bands):
        kept, step = band.fields["num_outliers"], band.factor if allocated == 0 else 2 * band.factor
        up = plan.projection.up_key[head, : step.numel()] * step[:, None]
        error = factors.numbers[head].double() * factors.units[head] - up
        assert error[kept:].abs().max() <= 1e-7 * up.abs().max()


def test_integers_are_more_exact(library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layers by either product. Nothing turns, so that the table of angles has no errors."""
    errors = {INT8: 0.0, FP16: 0.0}
    for seed in range(6):
        spec = Spec(seqs=((150, 2),), dtype=torch.float16, value_bits=8, seed=seed)
        case = on_integers(make_case(spec))
        rope = RotaryTable(torch.ones(200, 32), torch.zeros(200, 32))
        case = replace(case, plan=replace(case.plan, projection=replace(case.plan.projection, rope=rope)))
        expected = replace(case, query=case.query.float()).run(reference).double()
        for product in errors:
            with monkeypatch.context() as patched:
                if product == FP16:
                    patched.setattr(cuda_keys, "byte_units", lambda _: None)
                # A plan of its own: what is made of a plan is kept.
                anew = replace(case, plan=replace(case.plan))
                assert key_type(anew) == product
                output = run(library, anew, 2)
            errors[product] += float((output - expected[: output.shape[0]]).square().mean())
    print(errors)
    assert errors[INT8] < errors[FP16]


def test_blocks_of_a_multiprocessor(library) -> None:
    """Three blocks fit the 227 KiB of a Hopper GPU, two the 163 KiB of an A100, at 4 bits and heads of 128."""
    spec = Spec(head_size=128, key_group=128, value_group=128, dtype=torch.bfloat16)
    of_plan = cuda_decode.prepare(make_plan(spec), torch.bfloat16)
    assert of_plan is not None
    library.xquant_cuda_decode_shared_bytes.restype = ctypes.c_int64
    taken = library.xquant_cuda_decode_shared_bytes(ctypes.byref(of_plan), 1) + 1024
    print(f"{taken} bytes")
    assert 3 * taken <= 227 * 1024
    assert 2 * taken <= 163 * 1024


REFUSED = {
    "norm": Spec(norm=True),
    "no RoPE": Spec(rope="none"),
    "groups of a key": Spec(key_group=32),
    "groups of a value": Spec(value_group=32),
    "outliers of a value": Spec(value_outliers=1),
    "many outliers": Spec(key_outliers=5),
    "FP16 keys": Spec(key_bits=16, key_outliers=0),
    "head size": Spec(head_size=80, key_group=80, value_group=80),
    "joint basis": Spec(joint=True, key_group=128, value_group=128),
    "X": Spec(kind="x", hidden_size=64),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    assert cuda_decode.prepare(make_plan(REFUSED[name]), torch.bfloat16) is None


def test_type_refused() -> None:
    assert cuda_decode.prepare(make_plan(Spec()), torch.float32) is None


def test_takes(monkeypatch: pytest.MonkeyPatch, library) -> None:
    case = make_case(Spec(dtype=torch.bfloat16))
    of_call = case.plan, torch.bfloat16
    monkeypatch.setattr(cuda_library, "library", lambda: library)
    assert cuda_decode.takes(*of_call, case.pages, 16)
    assert not cuda_decode.takes(*of_call, case.pages, 32)
    odd = torch.empty(2, case.pages[0].shape[1] + 8, dtype=torch.uint8)[:, :-8]
    assert not cuda_decode.takes(*of_call, (odd,), 16)
    monkeypatch.setattr(cuda_library, "library", lambda: None)
    assert not cuda_decode.takes(*of_call, case.pages, 16)


def test_rope_that_is_no_rotation() -> None:
    """Tables whose angles do not grow evenly, as LongRoPE's, are left to the other kernel; a factor is no matter."""
    angles = torch.arange(500)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
    tables = [
        RotaryTable(1.2 * a.cos(), 1.2 * a.sin()) for a in (angles, torch.where(angles > 300, 1.1 * angles, angles))
    ]
    assert rope_arrays(tables[0], 32) is not None
    assert rope_arrays(tables[1], 32) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("seed", range(20))
def test_quads(seed: int, dtype: torch.dtype) -> None:
    """Every channel is in one quad; fast ones are as many as the packing allows."""
    runs = random_runs(random.Random(seed), 128)
    addresses = bit_addresses(runs)
    of_runs = quads(addresses, dtype)
    assert sorted(of_runs.order) == list(range(addresses.shape[1]))
    assert of_runs.masks.numel() * 4 == len(of_runs.order)
    slow = int((of_runs.masks >> 24).sum())
    if all(channels % 32 == 0 for _, channels in runs):
        assert slow == 0
    assert of_runs.any_slow == (slow > 0)


@pytest.mark.parametrize(("bits", "together"), [(8, 1), (6, 2), (4, 2), (3, 4), (2, 4)])
def test_quads_of_bytes(bits: int, together: int) -> None:
    """Quads that lie in the same bytes are neighbours, so that the kernel reads these once."""
    of_bits = quads(bit_addresses([(bits, 128)]), torch.int8)
    first_bytes = (of_bits.addresses[:, 0] & 0xFFFF) >> 3
    same = first_bytes.unflatten(0, (-1, together))
    assert (same == same[:, :1]).all()
    assert same[:, 0].unique().numel() == same.shape[0]
