"""What the simulation sees of an instruction: which pipe it needs, how long, and what waits for it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.counts.pipes import (
    CONSTANT_LATENCY,
    SHARED_LATENCY,
    SHUFFLE_LATENCY,
    XU_LATENCY,
    Sm,
    pipe,
    product_clocks,
    width,
)
from benchmarks.gpu.counts.sass import Instruction


@dataclass(frozen=True)
class Step:
    """One instruction of one warp.

    Attributes:
        units: names of pipes of which one is needed; ``"lsu"`` is the whole SM's, others are a scheduler's own.
        busy: clocks that it takes of the pipe.
        latency: clocks after that until the result is there.
        stall: clocks before the warp may issue its next instruction.
        sets: scoreboards for result and operands, 7: none.
        waits: scoreboards that must be clear.
        barrier: whether the warp waits for all others of its program.
        copies: whether what it loads is waited for in groups.
        group: ``"copy"`` or ``"product"``: closes a group; ``"wait copy"`` or ``"wait product"``: waits for groups.
        left: for how many groups not.
        writes: registers of the sums of a product, for which no scoreboard is set.
        reads: registers.
    """

    units: tuple[str, ...]
    busy: float
    latency: float
    stall: int
    sets: tuple[int, int]
    waits: tuple[int, ...]
    barrier: bool
    copies: bool
    group: str
    left: int
    writes: tuple[str, ...]
    reads: tuple[str, ...]


def steps(trace: Sequence[tuple[Instruction, float]], sm: Sm, load_latency: float) -> list[Step]:
    """A round, loops inside unrolled as often as counted."""
    result: list[Step] = []
    at = 0
    while at < len(trace):
        end, often = at, trace[at][1]
        while end < len(trace) and trace[end][1] == often:
            end += 1
        result += [_step(of, sm, load_latency) for of, _ in trace[at:end]] * max(1, round(often))
        at = end
    return result


def _step(of: Instruction, sm: Sm, load_latency: float) -> Step:
    units, busy, latency = _cost(of, sm, load_latency)
    parts = of.operands.split(",")
    writes: tuple[str, ...] = ()
    reads = tuple(number for part in parts[1:] for number in re.findall(r"\bR\d+", part))
    if units == ("tensor",) and not _asynchronous(of):
        writes = _consecutive(parts[0], 4)
        reads = _consecutive(parts[1], 4) + _consecutive(parts[2], 2) + _consecutive(parts[3], 4)
    group, left = _group(of)
    waits = tuple(board for board in range(6) if of.waits >> board & 1)
    return Step(
        units, busy, latency, max(1, of.stall), of.sets, waits, of.opcode == "BAR", of.opcode == "LDGSTS", group, left,
        writes, reads,
    )  # fmt: skip


def _cost(of: Instruction, sm: Sm, load_latency: float) -> tuple[tuple[str, ...], float, float]:
    """Pipes, clocks that one is busy, clocks until the result is there."""
    kind = pipe(of)
    if kind == "tensor":
        return ("tensor",), product_clocks(of, sm), sm.mma_latency
    if kind == "fma":
        return (("heavy", "lite") if sm.split_fma else ("heavy",)), 2, 0
    if kind == "imad":
        return ("heavy",), 2, 0
    if kind in ("alu", "xu"):
        return (kind,), 2 if kind == "alu" else 8, XU_LATENCY if kind == "xu" else 0
    if kind == "lsu":
        latency = load_latency if of.opcode in ("LDG", "LDGSTS", "LD") else SHARED_LATENCY
        latency = {"SHFL": SHUFFLE_LATENCY, "LDL": sm.near}.get(of.opcode, latency)
        # 32 lanes and 128 bytes per clock for the whole SM.
        return ("lsu",), max(1.0, width(of) * 32 / 128), latency
    return (), 0, CONSTANT_LATENCY if of.sets[0] < 6 else 0


def _asynchronous(of: Instruction) -> bool:
    return of.opcode.endswith("GMMA")


def _consecutive(text: str, count: int) -> tuple[str, ...]:
    found = re.search(r"\bR(\d+)", text)
    return tuple(f"R{int(found[1]) + i}" for i in range(count)) if found else ()


def _group(of: Instruction) -> tuple[str, int]:
    if of.opcode == "LDGDEPBAR":
        return "copy", 0
    if of.opcode == "DEPBAR" and "SB0" in of.operands:
        return "wait copy", int(of.operands.rsplit(",", 1)[1], 16)
    if _asynchronous(of) and "gsb0" in of.operands:
        return "product", 0
    if of.name.startswith("WARPGROUP.DEPBAR"):
        return "wait product", int(of.operands.rsplit(",", 1)[1], 16)
    return "", 0
