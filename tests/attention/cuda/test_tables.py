"""What the host makes for the CUDA kernels, and that it goes together with a layer's plan. No kernel runs."""

import gc
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.attention.attention_cases import Spec, make_plan, random_runs
from xquant_vllm.attention.dtype_codes import DTYPE_CODES
from xquant_vllm.codec.allocated import CANDIDATES, SCALE_BIAS, SCALES_PER_OCTAVE
from xquant_vllm.codec.packing import pack

pytest.importorskip("triton")
from xquant_vllm.attention.gpu.cuda import decode as cuda_decode
from xquant_vllm.attention.gpu.cuda import store as cuda_store
from xquant_vllm.attention.gpu.cuda.tables import MOST_OUTLIERS, TOKENS
from xquant_vllm.attention.gpu.gpu_plan import prepare
from xquant_vllm.attention.gpu.tables.tile_rotation import rope_arrays

CSRC = Path(__file__).resolve().parents[3] / "csrc"
CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(10))
def test_byte_records(seed: int) -> None:
    """Codes that are packed as the records say, as csrc/cuda/store/slot.h does, are those of the codec."""
    runs = random_runs(random.Random(seed), 64) if seed else ((8, 8), (6, 16), (4, 8), (3, 32), (2, 8))
    codes = [torch.randint(1 << bits, (channels,)) for bits, channels in runs]
    expected = torch.cat([pack(code, bits) for code, (bits, _) in zip(codes, runs, strict=True)])
    row = torch.cat(codes).tolist()
    packed = []
    for first, distance, bits_and_shift, reserved in cuda_store.byte_records(runs).tolist():
        bits, shift = bits_and_shift & 0xFF, bits_and_shift >> 8
        parts = (row[first + i * distance] >> shift & (1 << bits) - 1 for i in range(8 // bits))
        packed.append(sum(part << i * bits for i, part in enumerate(parts)))
        assert reserved == 0
    assert packed == expected.tolist()


def test_dtype_codes_are_those_of_the_cuda_kernels() -> None:
    header = (CSRC / "cuda" / "common" / "numbers.h").read_text()
    for name, dtype in {
        "Fp32": torch.float32,
        "Fp16": torch.float16,
        "Bf16": torch.bfloat16,
        "Int8": torch.int8,
    }.items():
        assert f"k{name} = {DTYPE_CODES[dtype]}" in header


def test_dtype_codes_are_those_of_the_cpu_kernels() -> None:
    header = (CSRC / "cpu" / "api.h").read_text()
    for name, dtype in {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}.items():
        assert re.search(rf"XQUANT_{name}\s*=?\s*{DTYPE_CODES[dtype]}\b", header)


def test_sizes_are_those_of_the_kernels() -> None:
    header = (CSRC / "cuda" / "decode" / "shape.h").read_text()
    for name, size in {"kTokens": TOKENS, "kMostOutliers": MOST_OUTLIERS, "kRows": cuda_decode.MOST_ROWS}.items():
        assert f"constexpr int {name} = {size};" in header


def test_scales_that_are_tried_are_those_of_the_codec() -> None:
    header = (CSRC / "cuda" / "store" / "allocated.h").read_text()
    step = CANDIDATES[1] - CANDIDATES[0]
    assert f"kCandidates = {len(CANDIDATES)};" in header
    assert f"middle - {-CANDIDATES[0]} + {step} * index, 1), 255)" in header
    assert f"log2(bounded) / 2 * {SCALES_PER_OCTAVE})) + {SCALE_BIAS};" in header


MADE = {
    "GpuPlan": (prepare, torch.bfloat16),
    "CudaDecodePlan": (cuda_decode.prepare, torch.bfloat16),
    "StoreCall": (cuda_store.prepare, CPU),
}


@pytest.mark.parametrize("name", MADE)
def test_made_once_for_a_plan(name: str) -> None:
    make, argument = MADE[name]
    plan = make_plan(Spec())
    made = make(plan, argument)
    assert made is not None
    assert make(plan, argument) is made
    assert make(replace(plan), argument) is not made


@pytest.mark.parametrize("name", ["CudaDecodePlan", "StoreCall"])
def test_forgotten_with_a_plan(name: str) -> None:
    """What is made of a plan does not keep it alive."""
    make, argument = MADE[name]
    kept = make.kept
    gc.collect()
    before = len(kept)
    plan = make_plan(Spec())
    make(plan, argument)
    assert len(kept) == before + 1
    del plan
    gc.collect()
    assert len(kept) == before


def test_rope_arrays_are_shared_by_layers() -> None:
    """Layers with one table of angles read one copy of its arrays."""
    first, second = make_plan(Spec()), make_plan(Spec())
    rope = first.projection.rope
    assert rope is not None
    second = replace(second, projection=replace(second.projection, rope=rope))
    of_layers = [cuda_decode.prepare(plan, torch.float16) for plan in (first, second)]
    assert len({(of.rope_base, of.rope_offset) for of in of_layers}) == 1
    assert rope_arrays(rope, 32) is rope_arrays(rope, 32)
