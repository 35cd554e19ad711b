"""Machine code of NVIDIA GPUs: instructions, loops, and what a warp executes in one round of a loop."""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_LABEL = re.compile(r"\s*(\.L_\w+):")
_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction, with what the compiler tells the scheduler (the upper bits of Volta's and later encodings).

    Attributes:
        name: with modifiers, such as ``"HMMA.16816.F32.BF16"``.
        operands: as printed.
        predicate: such as ``"@!P0"``, or empty.
        stall: clocks before the warp may issue its next instruction.
        sets: scoreboards that are set until the result is there, and until the operands are read (7: none).
        waits: bits of the scoreboards that must be clear before this one issues.
    """

    name: str
    operands: str
    predicate: str = ""
    stall: int = 1
    sets: tuple[int, int] = (7, 7)
    waits: int = 0

    @property
    def opcode(self) -> str:
        """The name without modifiers."""
        return self.name.split(".", 1)[0]


@dataclass
class Loop:
    """Instructions ``first`` to ``last``, which jumps back to ``first``; loops inside are in program order."""

    first: int
    last: int
    inside: list["Loop"] = field(default_factory=list)

    def spans(self) -> Iterator["Loop"]:
        """This loop and all inside it."""
        yield self
        for loop in self.inside:
            yield from loop.spans()


class SassError(Exception):
    """The machine code is not what counting it takes for granted."""


def disassemble(cubin: bytes) -> str:
    """What nvdisasm says, encodings included."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "nvdisasm", "-c", "-hex", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(text: str) -> tuple[list[Instruction], list[Loop]]:
    """The instructions of the only kernel in a listing, and its outermost loops."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = iter(text.splitlines())
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _LINE.match(line):
            second = _SECOND.match(next(lines))
            if second is None:
                raise SassError(f"no second half of an encoding after {line!r}")
            control = int(second[1], 16) >> 41
            code.append(
                Instruction(
                    found[2],
                    found[3].strip(),
                    found[1] or "",
                    control & 15,
                    (control >> 5 & 7, control >> 8 & 7),
                    control >> 11 & 63,
                )
            )
    return code, _loops(code, labels)


def _loops(code: Sequence[Instruction], labels: Mapping[str, int]) -> list[Loop]:
    ends: dict[int, int] = {}
    for at, instruction in enumerate(code):
        target = _TARGET.search(instruction.operands) if instruction.opcode == "BRA" else None
        # A jump to itself is where a kernel's code ends.
        if target and labels.get(target[1], len(code)) < at:
            ends[labels[target[1]]] = max(at, ends.get(labels[target[1]], 0))
    outermost: list[Loop] = []
    around: list[Loop] = []
    for first, last in sorted(ends.items(), key=lambda of: (of[0], -of[1])):
        while around and around[-1].last < first:
            around.pop()
        loop = Loop(first, last)
        (around[-1].inside if around else outermost).append(loop)
        around.append(loop)
    return outermost


def token_loops(code: Sequence[Instruction], loops: Sequence[Loop]) -> list[Loop]:
    """The loops over cached tokens: the innermost ones with products of matrices, a maximum, exponentials."""

    def of(loop: Loop) -> list[Loop]:
        deeper = [found for inner in loop.inside for found in of(inner)]
        body = code[loop.first : loop.last + 1]
        softmax = all(any(i.name.startswith(name) for i in body) for name in ("FMNMX", "MUFU.EX2"))
        return deeper or ([loop] if softmax and any(map(is_product, body)) else [])

    return [found for loop in loops for found in of(loop)]


def is_product(instruction: Instruction) -> bool:
    """Whether it is one of a tensor core: mma, wgmma or tcgen05."""
    return re.fullmatch(r"[HIQBDO]G?MMA|UTC\w*MMA", instruction.opcode) is not None


def executed(code: Sequence[Instruction], loop: Loop, rounds: Sequence[float] = ()) -> list[tuple[Instruction, float]]:
    """What a warp executes in one round of a loop, and how often each: both sides of every branch, once.

    Args:
        code: the kernel.
        loop: of it.
        rounds: of the loops inside, in program order, those inside of them included.

    Raises:
        SassError: there are more or fewer loops inside than ``rounds``.
    """
    inner = list(loop.spans())[1:]
    if len(inner) != len(rounds):
        sizes = [of.last - of.first + 1 for of in inner]
        raise SassError(
            f"the loop has {len(inner)} loops inside, of {sizes} instructions, but {len(rounds)} are expected"
        )
    often = [1.0] * (loop.last - loop.first + 1)
    for of, count in zip(inner, rounds, strict=True):
        for at in range(of.first, of.last + 1):
            often[at - loop.first] *= count
    return list(zip(code[loop.first : loop.last + 1], often, strict=True))
