"""The simulation beside kernels whose speed was published: how far off it is.

    python -m benchmarks.gpu.counts.known [FLASH_ATTENTION_2.cubin ...]

Compiles an attention of 16-bit keys and values as Triton's tutorial has it. Of FlashAttention-2 it takes what ``nvcc
-cubin`` makes of its kernels ``flash_fwd_kernel`` and ``flash_fwd_splitkv_kernel``, for sm_80 or sm_90.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.runtime.jit import MockTensor

from benchmarks.gpu.counts.pipes import DEVICES, Sm
from benchmarks.gpu.counts.sass import TOOLS, Instruction, disassemble, executed, parse, token_loops
from benchmarks.gpu.counts.simulate import resident, simulate
from tests.attention.gpu.compiled import GPUlessDriver, resources

PUBLISHED = {
    ("flash_fwd_kernel", 80, 128): "up to 230 TFLOP/s, arXiv 2307.08691",
    ("flash_fwd_kernel", 90, 128): "370 TFLOP/s, 16K tokens, arXiv 2407.08608",
    ("flash_fwd_kernel", 90, 64): "324 TFLOP/s, 16K tokens, the same",
    ("flash_fwd_splitkv_kernel", 80, 128): "bound by memory",
    ("flash_fwd_splitkv_kernel", 90, 128): "bound by memory",
    ("tutorial", 90, 128): "395 TFLOP/s (arXiv 2407.08608), 477 TFLOP/s (pytorch/benchmark 2391), 16K tokens",
}
"""What others measured of forward attention without a mask, by kernel, capability and head size."""


@triton.jit
def tutorial(
    query,
    key,
    value,
    output,
    tokens,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention without a mask of one tile of queries; everything ``[tokens, SIZE]`` FP16, one head."""
    channel = tl.arange(0, SIZE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    queries = tl.load(query + row[:, None] * SIZE + channel[None, :])
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, SIZE], tl.float32)
    for start in tl.range(0, tokens, TOKENS, num_stages=STAGES):
        at = (start + tl.arange(0, TOKENS))[:, None] * SIZE + channel[None, :]
        score = tl.dot(queries, tl.trans(tl.load(key + at)))
        now = tl.maximum(largest, tl.max(score, 1) * 0.1)
        weight = tl.exp2(score * 0.1 - now[:, None])
        decay = tl.exp2(largest - now)
        total = total * decay + tl.sum(weight, 1)
        sums = tl.dot(weight.to(tl.float16), tl.load(value + at), sums * decay[:, None])
        largest = now
    tl.store(output + row[:, None] * SIZE + channel[None, :], (sums / total[:, None]).to(tl.float16))


def compiled_tutorial(capability: int, size: int, tokens: int, warps: int, stages: int) -> tuple[bytes, int]:
    """Machine code, and bytes of shared memory."""
    triton.runtime.driver.set_active(GPUlessDriver(capability))
    pointers = [MockTensor(torch.float16) for _ in range(4)]
    binary = tutorial.warmup(
        *pointers, 16384, ROWS=128, TOKENS=tokens, SIZE=size, STAGES=stages, num_warps=warps, num_stages=stages,
        enable_fp_fusion=True, grid=(1,),
    )  # fmt: skip
    return binary.asm["cubin"], binary.metadata.shared


def functions(cubin: bytes) -> Iterator[str]:
    """Listings of the kernels in a file."""
    yield from disassemble(cubin).split("\t.section\t.text.")[1:]


def show(
    name: str, sm: Sm, size: int, rows: int, tokens: int, warps: int, registers: int, shared: int, text: str
) -> None:
    """Simulate a kernel with ``rows`` queries and ``tokens`` keys a round, and say what is known of it."""
    code, loops = parse(text)
    trace: list[tuple[Instruction, float]] = executed(code, token_loops(code, loops)[0])
    programs = resident(sm, warps, registers, shared)
    found = []
    for latency in (sm.near, sm.far):
        second = sm.clock * sm.sms * programs / simulate(trace, sm, programs, warps, latency).clocks
        found.append((4 * rows * tokens * size * second / 1e12, 4 * tokens * size * second / 1e12))
    print(
        f"| {name} | {sm.name} | {size} | {rows} x {tokens} | {found[0][0]:.0f} - {found[1][0]:.0f} | {found[0][1]:.1f}"
        f" - {found[1][1]:.1f} of {sm.memory / 1e12:.2f} | {PUBLISHED.get((name, sm.capability, size), 'not known')} |",
        flush=True,
    )


def main() -> None:
    """Print a table."""
    print("| kernel | GPU | head size | tile | simulated TFLOP/s | TB/s, if nothing is shared | published |")
    print("|---|---|---|---|---|---|---|")
    for capability, size, tokens, warps, stages in ((90, 128, 128, 8, 2), (90, 128, 64, 8, 3)):
        cubin, shared = compiled_tutorial(capability, size, tokens, warps, stages)
        (text,) = functions(cubin)
        registers, _ = resources(cubin)
        show("tutorial", DEVICES[capability], size, 128, tokens, warps, registers, shared, text)
    for path in map(Path, sys.argv[1:]):
        cubin = path.read_bytes()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", usage))
        for text in functions(cubin):
            mangled = text.split(",", 1)[0]
            traits = re.search(r"(flash_fwd_\w*?kernel)I.*?traitsILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)", mangled)
            arch = re.search(r"sm_(\d+)", disassemble(cubin))
            assert traits, mangled
            assert arch, path
            size, rows, tokens, warps = map(int, traits.groups()[1:])
            shared = 2 * size * (rows + 2 * tokens)
            show(traits[1], DEVICES[int(arch[1])], size, rows, tokens, warps, int(registers[mangled]), shared, text)


if __name__ == "__main__":
    main()
