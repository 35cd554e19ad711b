"""Counts a kernel's instructions: those that warps execute for 64 cached tokens of one kv head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.counts.pipes import PIPES, pipe
from benchmarks.gpu.counts.rows import Row
from benchmarks.gpu.counts.sass import Instruction, Loop, SassError, disassemble, executed, parse, token_loops
from tests.attention.gpu.compiled import compiled_launches, resources

PER = 64
"""Cached tokens that everything is counted for."""


@dataclass(frozen=True)
class Counted:
    """What was found.

    Attributes:
        row: what was counted.
        kernel: its name.
        tokens: cached tokens of a round of its loop, or of a program where it has none.
        warps: of a program.
        registers: of a thread.
        spilled: bytes of registers that a thread keeps in memory.
        shared: bytes of shared memory of a program.
        trace: what a warp executes in a round, and how often each.
    """

    row: Row
    kernel: str
    tokens: int
    warps: int
    registers: int
    spilled: int
    shared: int
    trace: list[tuple[Instruction, float]]

    @property
    def by_pipe(self) -> dict[str, float]:
        """Warp instructions per 64 tokens and kv head."""
        result = dict.fromkeys(PIPES, 0.0)
        for instruction, often in self.trace:
            result[pipe(instruction)] += often * self.warps * PER / self.tokens
        return result

    @property
    def instructions(self) -> float:
        """All warp instructions per 64 tokens and kv head."""
        return sum(self.by_pipe.values())

    @property
    def barriers(self) -> float:
        """Times that a warp waits for all others of its program, per 64 tokens."""
        often = sum(often for instruction, often in self.trace if instruction.opcode == "BAR")
        return often * PER / self.tokens


def count(row: Row) -> Counted:
    """Compile a row's kernels and count the one that it names.

    Raises:
        SassError: that kernel cannot be told from others, or its loops are others than the row says.
    """
    with compiled_launches(row.capability) as launches:
        row.launch()
    programs = {}
    for name, binary in launches:
        if row.kernel is None or row.kernel == name:
            code, loops = parse(disassemble(binary.asm["cubin"]))
            if row.kernel or token_loops(code, loops):
                programs[binary.hash] = (name, binary, code, loops)
    if len(programs) != 1:
        names = sorted({name for name, _ in launches})
        raise SassError(f"{row.name}: of the kernels {names}, {len(programs)} loop over cached tokens and not one")
    ((name, binary, code, loops),) = programs.values()
    # The first of several: what is left over comes after it, masked.
    loop = token_loops(code, loops)[0] if row.kernel is None else _whole(code, loops)
    trace = executed(code, loop, row.rounds if loop.inside else ())
    registers, stack = resources(binary.asm["cubin"])
    metadata = binary.metadata
    return Counted(row, name, tile_of(binary.src), metadata.num_warps, registers, stack, metadata.shared, trace)


def count_store(launch: Callable[[], None], scale_groups: int, capability: int = 90) -> float:
    """Warp instructions to store one token: of all kernels that a store launches, to their ends.

    Args:
        launch: stores tokens into streams of as many scale groups each.
        scale_groups: of a token and stream; a program has one of them, for as many tokens as it is compiled for.
        capability: what is compiled for.
    """
    with compiled_launches(capability) as launches:
        launch()
    instructions = 0.0
    for _, binary in launches:
        code, loops = parse(disassemble(binary.asm["cubin"]))
        of_program = len(executed(code, _whole(code, loops))) * binary.metadata.num_warps
        instructions += of_program * scale_groups / tile_of(binary.src)
    return instructions


def _whole(code: list[Instruction], loops: list[Loop]) -> Loop:
    """A kernel without a loop over tokens, as one round."""
    return Loop(0, max(at for at, of in enumerate(code) if of.opcode == "EXIT"), loops)


def tile_of(source: Any) -> int:
    """Cached tokens of a tile: the kernel's compile-time argument ``TOKENS``, else its module's constant ``_TILE``.

    Raises:
        SassError: there is neither.
    """
    kernel = source.fn
    for path, value in source.constants.items():
        if len(path) == 1 and kernel.arg_names[path[0]] == "TOKENS":
            return int(value)
    constant = kernel.fn.__globals__.get("_TILE")
    if constant is None:
        raise SassError(
            f"{kernel.fn.__name__} has neither an argument TOKENS nor a constant _TILE: how large is a tile?"
        )
    return int(getattr(constant, "value", constant))
