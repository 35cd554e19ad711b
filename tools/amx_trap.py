"""AMX's instructions on a processor without AMX, and counts of instructions: for tests and for count_instructions.py.

The object code that a processor with AMX runs is run here: every AMX instruction in it is refused by the processor,
read by amx_trap.cpp and done in plain C++. What is not AMX runs as it is. So operands, strides and the order of
instructions are tested, not only the source. The library's instruction set "amx-trapped" is for this.
"""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc' / 'cpu'}", "-mavx2", "-mfma", "-mf16c"]
_FLAGS += [f"-mavx512{name}" for name in ("f", "bw", "dq", "vl")]
KINDS = ("tile products", "tile loads and stores", "other of tiles", "dot products", "other vectors", "rest")
"""Of instructions: AMX's three, VPDPBUSD and VPDPWSSD of 512 bits, other instructions of 512 bits, and all others."""


def build(folder: Path) -> ctypes.CDLL:
    """Compile the trap into ``folder``.

    Raises:
        CalledProcessError: g++ fails.
    """
    target = folder / "amx_trap.so"
    subprocess.run(["g++", *_FLAGS, str(_SOURCE), "-o", str(target)], check=True)
    trap = ctypes.CDLL(str(target))
    trap.count_start.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    trap.count_start.restype = None
    trap.count_stop.restype = None
    return trap


@contextmanager
def trapped(trap: ctypes.CDLL) -> Iterator[None]:
    """AMX's instructions of this thread are done by the trap."""
    trap.trap_start()
    try:
        yield
    finally:
        trap.trap_stop()


@contextmanager
def counted(trap: ctypes.CDLL, library: Path) -> Iterator[dict[str, int]]:
    """Count what this thread runs of a loaded library; the dict is filled, by :data:`KINDS`, when the block ends."""
    found: dict[str, int] = {}
    counts = (ctypes.c_uint64 * len(KINDS))()
    trap.count_start(*_code_of(library))
    try:
        yield found
    finally:
        trap.count_stop(counts)
    found.update(zip(KINDS, counts, strict=True))


def _code_of(library: Path) -> tuple[int, int]:
    """Where its code is in memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if fields[-1] == str(library.resolve()) and "x" in fields[1]:
            low, high = fields[0].split("-")
            return int(low, 16), int(high, 16)
    raise ValueError(f"{library} is not loaded")
