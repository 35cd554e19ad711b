"""Warps of resident programs that run a counted loop through the pipes of an SM, clock by clock.

Each scheduler issues one instruction per clock. A warp issues in order: after its last instruction's stall, when the
scoreboards that the instruction waits for are clear, when its pipe is free. Stalls and scoreboards are the compiler's
own, from the encoding; how long pipes are busy is in ``pipes``. Copies and ``wgmma`` are waited for in groups, barriers
by whole programs.

Left out, so too fast: bank conflicts, loads that lanes do not share, register banks, the instruction cache, a
clock that heat throttles. Both sides of every branch run, which is too slow. ``known`` says how far off it is.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.counts.pipes import BARRIER_LATENCY, READ_LATENCY, Sm
from benchmarks.gpu.counts.sass import Instruction
from benchmarks.gpu.counts.steps import Step, steps

_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32
# Rounds that are run, fewer of long loops, and the share of them before the clock counts.
_ROUNDS, _INSTRUCTIONS, _SKIPPED = 8, 400_000, 0.4
# Clocks of work that waits for the load/store unit at most; assumed.
_QUEUE = 64


@dataclass(frozen=True)
class Simulated:
    """What came of it.

    Attributes:
        programs: resident ones.
        clocks: of a round of all of them.
        issued: warp instructions per clock, of 4.
        busy: of every kind of pipe, the share of the time.
    """

    programs: int
    clocks: float
    issued: float
    busy: dict[str, float]


def resident(sm: Sm, warps: int, registers: int, shared: int) -> int:
    """Programs that an SM holds at the same time; 0 if not even one."""
    by_registers = _REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    return min(by_registers, sm.shared // (shared + 1024), _WARPS // warps, _PROGRAMS)


class _Warp:
    def __init__(self, index: int, warps: int) -> None:
        self.index, self.program, self.scheduler = index, index // warps, index % 4
        self.at, self.ready, self.copied = 0, 0.0, 0.0
        self.boards = [0.0] * 6
        self.groups: dict[str, list[float]] = {"copy": [], "product": []}
        self.sums: dict[str, float] = {}

    def may_issue(self, step: Step) -> float:
        """When, as far as the warp itself is concerned."""
        times = [self.ready, *(self.boards[board] for board in step.waits)]
        times += [self.sums[register] for register in step.reads if register in self.sums]
        if step.group.startswith("wait"):
            groups = self.groups[step.group.split()[1]]
            times += groups[: len(groups) - step.left]
        return max(times)

    def issue(self, step: Step, time: float, begin: float) -> None:
        """At ``time``; its pipe takes it at ``begin``."""
        end = begin + step.busy + step.latency
        for board, until in zip(step.sets, (end, begin + READ_LATENCY), strict=True):
            if board < 6:
                self.boards[board] = max(self.boards[board], until)
        self.sums.update(dict.fromkeys(step.writes, end))
        if step.copies:
            self.copied = max(self.copied, end)
        if step.group in self.groups:
            of = self.groups[step.group]
            of.append(self.copied if step.group == "copy" else end)
            del of[:-8]
        self.ready = time + step.stall


def simulate(
    trace: Sequence[tuple[Instruction, float]], sm: Sm, programs: int, warps: int, load_latency: float
) -> Simulated:
    """Run a few rounds of the loop.

    Args:
        trace: of a round, see ``sass.executed``.
        sm: which SM.
        programs: resident ones.
        warps: of a program.
        load_latency: clocks of a load from global memory.
    """
    body = steps(trace, sm, load_latency)
    crew = [_Warp(index, warps) for index in range(programs * warps)]
    round_ = len(body) * len(crew)
    total = min(_ROUNDS, 2 + _INSTRUCTIONS // round_) * round_
    free: dict[tuple[str, int], float] = {}
    issue = [0.0] * 4
    arrived: list[list[_Warp]] = [[] for _ in range(programs)]
    busy: dict[str, float] = {}
    queue = [(0.0, index) for index in range(len(crew))]
    issued, first, began = 0, int(total * _SKIPPED), 0.0
    time = 0.0
    while issued < total:
        when, index = heapq.heappop(queue)
        warp = crew[index]
        step = body[warp.at]
        pipes = [(unit, 0 if unit == "lsu" else warp.scheduler) for unit in step.units]
        chosen = min(pipes, key=lambda of: free.get(of, 0.0)) if pipes else None
        time = max(when, warp.may_issue(step), issue[warp.scheduler])
        # Loads and stores queue behind the schedulers, as long as there is room; other pipes hold an instruction back.
        if chosen is not None:
            time = max(time, free.get(chosen, 0.0) - (_QUEUE if chosen[0] == "lsu" else 0))
        if time > when:
            heapq.heappush(queue, (time, index))
            continue
        issue[warp.scheduler] = time + 1
        begin = time
        if chosen is not None:
            begin = max(time, free.get(chosen, 0.0))
            free[chosen] = begin + step.busy
        warp.issue(step, time, begin)
        issued += 1
        if issued == first:
            began = time
        elif issued > first and chosen is not None:
            busy[chosen[0]] = busy.get(chosen[0], 0.0) + step.busy
        warp.at = (warp.at + 1) % len(body)
        if not step.barrier:
            heapq.heappush(queue, (warp.ready, index))
            continue
        waiting = arrived[warp.program]
        waiting.append(warp)
        if len(waiting) == warps:
            for other in waiting:
                other.ready = max(other.ready, time + BARRIER_LATENCY)
                heapq.heappush(queue, (other.ready, other.index))
            waiting.clear()
    span = time - began
    per_clock = (total - first) / span
    shares = {name: value / span / (1 if name == "lsu" else 4) for name, value in busy.items()}
    return Simulated(programs, round_ / per_clock, per_clock, shares)
