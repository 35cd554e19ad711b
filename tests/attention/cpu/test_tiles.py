"""AMX: what is integer has the bits of VNNI, and what the emulated tiles do is what Intel's manual says."""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.attention.attention_cases import Case, Spec, make_case, random_spec
from tests.cpu_kernels import bits, has_kernels
from xquant_vllm.attention import reference

if not has_kernels():
    pytest.skip("no kernels", allow_module_level=True)

from xquant_vllm.attention.cpu import kernels as cpu
from xquant_vllm.attention.cpu import library
from xquant_vllm.attention.cpu.plan import CpuPlan

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cpu"
AMX_SETS = ("amx", "amx-emulated")


def assert_bits_of_vnni(case: Case, amx: str) -> None:
    outputs = []
    try:
        for isa in ("vnni", amx):
            if not library.set_isa(isa):
                pytest.skip(f"this machine has no {isa}")
            outputs.append(case.run(cpu))
    finally:
        library.set_isa(None)
    assert torch.equal(bits(outputs[0]), bits(outputs[1]))


@pytest.mark.parametrize("amx", AMX_SETS)
@pytest.mark.parametrize("seed", range(200, 230))
def test_values_have_the_bits_of_vnni(amx: str, seed: int) -> None:
    """Scores of absorbed keys are FP32 in both."""
    spec = replace(random_spec(seed), rope="none", norm=False, bias=False, exact_from=None)
    assert_bits_of_vnni(make_case(spec), amx)


EXACT_KEYS = {
    "decode": Spec(seqs=((700, 1), (1, 1), (65, 1))),
    "prefill": Spec(seqs=((300, 40), (64, 64)), group=2),
    "17 rows": Spec(seqs=((300, 17),), group=1),
    "32 rows": Spec(seqs=((90, 4),), group=8),
    "2 bits, groups of 32": Spec(seqs=((300, 2),), key_group=32, key_bits=2),
    "3 bits, narrow head": Spec(seqs=((300, 2),), head_size=24, key_group=24, value_group=24, key_bits=3),
    "groups of 8": Spec(seqs=((130, 2),), head_size=16, key_group=8, value_group=8),
    "heads of 72": Spec(seqs=((300, 3),), head_size=72, key_group=72, value_group=72, bias=False),
    "heads of 128": Spec(seqs=((300, 3),), head_size=128, key_group=128, value_group=128),
    "heads of 160": Spec(seqs=((300, 3),), kv_heads=1, head_size=160, key_group=160, value_group=160),
    "partly turned": Spec(seqs=((300, 3),), rotary_size=32),
}


def exact_keys(spec: Spec) -> Case:
    """A case whose keys are whole numbers below 256, which BF16 holds, and whose scores FP32 holds.

    Latents are codes, because every group has the smallest and the largest one, with an up-projection of -1, 0 and 1.
    """
    case = make_case(replace(spec, key_outliers=0))
    generator = torch.Generator().manual_seed(1)
    stream = case.plan.layout.streams[0]
    projection = case.plan.projection
    largest = 2**spec.key_bits - 1
    starts = case.batch.query_start_loc.tolist()
    for index, (length, _) in enumerate(spec.seqs):
        assert starts[index + 1] > starts[index]
        positions = torch.arange(length)
        slots = case.batch.block_table[index].long()[positions // spec.block_size] * spec.block_size
        latents = torch.randint(0, largest + 1, (length, stream.num_heads, stream.width), generator=generator).float()
        latents[..., :: spec.key_group] = 0
        latents[..., 1 :: spec.key_group] = largest
        values = torch.randn(length, spec.kv_heads * spec.head_size, generator=generator)
        reference.store(case.pages, case.plan, slots + positions % spec.block_size, (latents, values))
    up = torch.zeros_like(projection.up_key)
    for channel in range(6):
        rows = torch.randint(0, stream.width // 8, (up.shape[0], 1, up.shape[2]), generator=generator) * 8 + channel + 2
        up.scatter_(1, rows, torch.randint(0, 2, rows.shape, generator=generator).float() * 2 - 1)
    up[:, :: spec.key_group] = 127  # of what is always 0: so that the unit is 1
    rope = projection.rope
    assert rope is not None
    rope = replace(rope, cos=torch.ones_like(rope.cos), sin=torch.zeros_like(rope.sin))
    query = torch.randint(-4, 5, case.query.shape, generator=generator).to(case.query.dtype)
    plan = replace(case.plan, scale=1 / 64, projection=replace(projection, up_key=up, rope=rope))
    return replace(case, plan=plan, query=query)


@pytest.mark.parametrize("amx", AMX_SETS)
@pytest.mark.parametrize("name", EXACT_KEYS)
def test_keys_have_the_bits_of_vnni(amx: str, name: str) -> None:
    case = exact_keys(EXACT_KEYS[name])
    integers = CpuPlan(case.plan, with_integers=True).integer_keys
    assert integers is not None and (integers.first_tiles >= 0).all()
    assert_bits_of_vnni(case, amx)


# --- The emulated instructions ---

EMULATION = """
#include "common/bfloat.h"
#include "tiles/registers.h"
using namespace xquant;
extern "C" void multiply(int bfloats, int rows, const void* a, const void* b, void* c) {
    configure_tiles_for(rows);
    load_tile<kLastSumTile>(c, 64);
    load_tile<kLastLeftTile>(a, 64);
    load_tile<kRightTile>(b, 64);
    if (bfloats) {
        multiply_bfloats<kLastSumTile, kLastLeftTile, kRightTile>();
    } else {
        multiply_bytes<kLastSumTile, kLastLeftTile, kRightTile>();
    }
    store_tile<kLastSumTile>(c, 64);
    release_tiles();
}
extern "C" void round_pairs(const float* first, const float* second, int32_t* to) {
    const vi pairs = bfloat_pairs(load(first), load(second));
    memcpy(to, &pairs, sizeof pairs);
}
extern "C" void round_single(const float* from, uint16_t* to) {
    for (int i = 0; i < 16; ++i) to[i] = to_bfloat(from[i]);
}
"""
FLAGS = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{SOURCES}", "-mavx2", "-mfma", "-mf16c"]
FLAGS += [f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "vnni", "vbmi")]


def has(flag: str) -> bool:
    """Whether the processor does."""
    path = Path("/proc/cpuinfo")
    return path.is_file() and flag in path.read_text().split()


def build(folder: Path, *flags: str) -> ctypes.CDLL:
    target = folder / f"tiles{len(flags)}.so"
    command = ["g++", *FLAGS, "-DXQUANT_EMULATE_TILES", *flags, "-x", "c++", "-", "-o", str(target)]
    subprocess.run(command, input=EMULATION, text=True, check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None or not has("avx512_vnni"):
        pytest.skip("g++ or AVX-512 is missing")
    return build(tmp_path_factory.mktemp("tiles"))


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize("rows", [1, 3, 15, 16])
def test_products_of_bytes(emulation: ctypes.CDLL, rows: int) -> None:
    a = torch.randint(-128, 128, (rows, 64), dtype=torch.int8)
    b = torch.randint(256, (16, 16, 4), dtype=torch.uint8)  # [k / 4, columns, 4]
    c = torch.randint(-(10**6), 10**6, (rows, 16), dtype=torch.int32)
    expected = c + a.int() @ b.transpose(1, 2).reshape(64, 16).int()
    emulation.multiply(0, rows, pointer(a), pointer(b), pointer(c))
    assert torch.equal(c, expected)


def flushed(x: torch.Tensor) -> torch.Tensor:
    """Subnormal FP32 numbers as 0."""
    return torch.where(x.abs() < 2.0**-126, torch.zeros_like(x), x)


@pytest.mark.parametrize("exponent", [0, -70, 60])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_products_of_bfloats(emulation: ctypes.CDLL, rows: int, exponent: int) -> None:
    """By FP64, in which a product of BF16 and its sum with an FP32 number are rounded once to FP32, but for rare ties."""
    a = (torch.randn(rows, 16, 2) * 2.0**exponent).bfloat16()  # [rows, k / 2, 2]
    b = (torch.randn(16, 16, 2) * 2.0**exponent).bfloat16()  # [k / 2, columns, 2]
    a[0, 0, 0], b[1, 1, 1] = 2.0**-130, -(2.0**-128)
    c = torch.randn(rows, 16) * 2.0 ** max(-120, 2 * exponent)
    # Even numbers for themselves and odd ones, in ascending order, then their sum, then C.
    halves = torch.zeros(rows, 16, 2)
    left, right = flushed(a.float()).double(), flushed(b.float()).double()
    for k in range(16):
        halves = flushed((halves.double() + left[:, k, None] * right[None, k]).float())
    expected = flushed(c + flushed(halves[..., 0] + halves[..., 1]))
    emulation.multiply(1, rows, pointer(a), pointer(b), pointer(c))
    torch.testing.assert_close(c, expected, rtol=0, atol=0)


def test_rounding_to_bfloats(emulation: ctypes.CDLL, tmp_path: Path) -> None:
    """As torch, with subnormal numbers as 0; the processor's own instruction, where there is one, agrees."""
    torch.manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (2, 4096, 16), dtype=torch.int64).int().view(torch.float32)
    x[0, 0] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 2.0**-126, -(2.0**-127), 1e-45] * 2)
    ways = [emulation] + ([build(tmp_path, "-mavx512bf16")] if has("avx512_bf16") else [])
    expected = flushed(x).bfloat16()
    for way in ways:
        pairs, single = torch.empty(4096, 16, 2, dtype=torch.bfloat16), torch.empty(4096, 16, dtype=torch.bfloat16)
        for i in range(len(pairs)):
            way.round_pairs(pointer(x[0, i]), pointer(x[1, i]), pointer(pairs[i]))
            way.round_single(pointer(x[0, i]), pointer(single[i]))
        torch.testing.assert_close(pairs, expected.permute(1, 2, 0), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(single, expected[0], rtol=0, atol=0, equal_nan=True)


# --- What is compiled, and what is chosen ---


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing")
def test_the_library_has_the_instructions() -> None:
    if library.tiles_refused() == "this build was made by a compiler without AMX":
        pytest.skip("the compiler lacks AMX")
    command = ["objdump", "-d", "--no-show-raw-insn", str(library.LIBRARY_PATH)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in ("ldtilecfg", "tilerelease", "tileloadd", "tilestored", "tdpbsud", "tdpbf16ps", "vcvtne2ps2bf16"):
        assert instruction in listed, instruction


TILE, INT8, BFLOAT, VECTOR_BFLOAT, STATE = 1 << 24, 1 << 25, 1 << 22, 1 << 5, 3 << 17
REFUSALS = {
    "": (TILE | INT8 | BFLOAT, VECTOR_BFLOAT, STATE | 7, True),
    "the processor has no AMX": (INT8 | BFLOAT, VECTOR_BFLOAT, STATE, True),
    "the processor's AMX lacks INT8 or BF16": (TILE | INT8, VECTOR_BFLOAT, STATE, True),
    "the operating system does not save AMX's state": (TILE | INT8 | BFLOAT, VECTOR_BFLOAT, 1 << 17, True),
    "the kernel does not let this process use AMX": (TILE | INT8 | BFLOAT, VECTOR_BFLOAT, STATE, False),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_who_may_use_tiles(reason: str) -> None:
    said = library.library.xquant_cpu_why_no_tiles(*REFUSALS[reason])
    assert (said or b"").decode() == reason


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    library.set_isa(None)
    assert library.isa() != "amx-emulated"
    assert (library.isa() == "amx") == (library.tiles_refused() is None)
    assert library.set_isa("amx") == (library.tiles_refused() is None)
    library.set_isa(None)
    monkeypatch.setattr(library, "tiles_refused", lambda: library.NO_TILES)
    assert library.describe() == library.isa()
    monkeypatch.setattr(library, "tiles_refused", lambda: "the kernel does not let this process use AMX")
    assert library.describe().endswith(" (not AMX: the kernel does not let this process use AMX)")
