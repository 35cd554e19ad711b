"""Which part of an SM an instruction keeps busy, and for how long.

Rates are the vendor's: the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide
(lanes per clock and SM), the peak rates of the A100 and H100 white papers, and the pipelines of the Nsight Compute
documentation ("Pipelines" in its Kernel Profiling Guide). Two are measured by others: what ``mma`` reaches on Hopper's
tensor cores and the latencies of memory (Luo et al., arXiv 2402.13499).
"""

import re
from dataclasses import dataclass

from benchmarks.gpu.counts.sass import Instruction, is_product

PIPES = ("tensor", "fma", "imad", "alu", "xu", "lsu", "uniform", "other")
"""As tables have them; ``imad`` are those of FMA instructions that only half of Hopper's FMA lanes do."""

_FMA = {"FFMA", "FMUL", "FADD", "HADD2", "HMUL2", "HFMA2", "HADD2_32I", "HFMA2_MMA", "FFMA32I", "FADD32I", "FMUL32I"}
_XU = {"MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV", "FRND", "I2I"}
_LSU = {
    "LDG",
    "STG",
    "LDS",
    "STS",
    "LDSM",
    "STSM",
    "LDGSTS",
    "SHFL",
    "LDL",
    "STL",
    "ATOM",
    "ATOMG",
    "ATOMS",
    "RED",
    "LD",
    "ST",
}
_CONTROL = {
    "ARRIVES", "BAR", "BMOV", "BRA", "BSSY", "BSYNC", "CALL", "CCTL", "CS2R", "DEPBAR", "ELECT", "ERRBAR", "EXIT",
    "FENCE", "LDC", "LDCU", "LDGDEPBAR", "LDTM", "MEMBAR", "NANOSLEEP", "NOP", "PREEXIT", "R2UR", "RET", "S2R",
    "S2UR", "STTM", "SYNCS", "UBLKCP", "UCGABAR_ARV", "ULDC", "USETMAXREG", "UTMALDG", "UTMAPF", "UTMASTG",
    "WARPGROUP", "WARPGROUPSET", "WARPSYNC", "YIELD",
}  # fmt: skip
_UNIFORM = re.compile(r"U[A-Z]")


def pipe(instruction: Instruction) -> str:
    """One of ``PIPES``. An opcode that is not known otherwise is taken for one of integers, logic or comparison."""
    opcode = instruction.opcode
    if is_product(instruction):
        return "tensor"
    for name, opcodes in (("other", _CONTROL), ("lsu", _LSU), ("xu", _XU), ("fma", _FMA)):
        if opcode in opcodes:
            return name
    if opcode.startswith(("IMAD", "IDP", "IMUL")):
        return "imad"
    return "uniform" if _UNIFORM.match(opcode) else "alu"


@dataclass(frozen=True)
class Sm:
    """A multiprocessor: four schedulers, each with pipes of its own, and what they share.

    Attributes:
        name: of the GPU.
        sms: how many it has.
        clock: per second.
        memory: bytes per second.
        split_fma: whether beside 16 lanes per scheduler for all multiply-adds there are 16 for FP32 only.
        tensor: FP16 or BF16 operations per clock and scheduler.
        mma: share of these that ``mma`` reaches (``wgmma`` all).
        mma_latency: clocks until the result of an ``mma`` of 16 x 8 x 16 is there.
        near: clocks of a load that L1 holds.
        far: clocks of a load from device memory.
        shared: bytes of shared memory that programs may share.
        capability: compute capability.
    """

    name: str
    sms: int
    clock: float
    memory: float
    split_fma: bool
    tensor: int
    mma: float
    mma_latency: int
    near: int
    far: int
    shared: int
    capability: int

    def bytes_per_clock(self, share: float) -> float:
        """Of device memory per SM, if kernels reach ``share`` of it."""
        return self.memory * share / self.sms / self.clock


# White papers: SMs, boost clock, memory, FP16 operations (312 and 989 TFLOP/s, dense). Latencies and the share of mma:
# Luo et al., tables of memory latency and of mma.
A100 = Sm("A100", 108, 1.41e9, 2.039e12, False, 512, 1.0, 33, 38, 466, 167936, 80)
H100 = Sm("H100", 132, 1.83e9, 3.35e12, True, 1024, 0.63, 33, 41, 479, 233472, 90)
DEVICES = {sm.capability: sm for sm in (A100, H100)}

# Clocks until results are there, of pipes whose results are waited for (the last: operands were read; all warps go on).
XU_LATENCY, SHARED_LATENCY, SHUFFLE_LATENCY, CONSTANT_LATENCY = 23, 29, 24, 30
READ_LATENCY, BARRIER_LATENCY = 12, 20

_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "16864": (16, 8, 64)}


def product_clocks(instruction: Instruction, sm: Sm) -> float:
    """Clocks that a tensor core of one scheduler works on an instruction of one warp.

    Raises:
        KeyError: its shape or dtype is not known.
    """
    name = instruction.name
    wgmma = re.match(r"[HIQ]GMMA\.64x(\d+)x(\d+)", name)
    eight_bits = instruction.opcode in ("IMMA", "IGMMA", "QGMMA")
    rate = sm.tensor * (2 if eight_bits else 1)
    if wgmma:  # a warp has 16 of the 64 rows
        return 2 * 16 * int(wgmma[1]) * int(wgmma[2]) / rate
    rows, columns, depth = _SHAPES[name.split(".")[1]]
    return 2 * rows * columns * depth / (rate * sm.mma)


def width(instruction: Instruction) -> int:
    """Bytes that a lane loads, stores or copies."""
    name = instruction.name
    if instruction.opcode in ("LDSM", "STSM"):
        return 4 * int(found[1]) if (found := re.search(r"\.([124])$", name)) else 4
    for bits, size in ((".128", 16), (".64", 8), (".U8", 1), (".S8", 1), (".U16", 2), (".S16", 2)):
        if bits in name:
            return size
    return 4
