"""What the emulated tiles do is what Intel's manual says."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cpu"

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
    store_bfloats(to, load(from));
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
    """By FP64: a product of BF16 and its sum with an FP32 number are rounded once to FP32, but for rare ties."""
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
