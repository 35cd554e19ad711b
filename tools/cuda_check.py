"""Compile every kernel of csrc/cuda for every GPU it is built for; fails on errors, warnings and register spills.

What ``ptxas`` says of every kernel is printed as a table. Needs nvcc (CUDA 12.8 or later), no GPU; without nvcc it says
so and succeeds. Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
TARGETS = ("80", "90a", "100")
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v,-warn-spills", "-Xcompiler", "-Wall,-Wextra", "-I", str(SOURCES)]


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel."""

    name: str
    target: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


class CheckError(Exception):
    """A source does not compile; the message is what the user reads."""


def find_nvcc() -> str | None:
    """The compiler: ``$NVCC``, on the path, or where CUDA is usually installed."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return os.environ.get("NVCC") or shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def readable(mangled: str) -> str:
    """Name and template arguments of a kernel in a namespace, without that: ``decode_kernel<64, 1>``."""
    at, last = len("_ZN"), mangled
    while number := re.match(r"\d+", mangled[at:]):
        begin = at + number.end()
        at = begin + int(number.group())
        last = mangled[begin:at]
    arguments = re.match(r"I((?:Li-?\d+E)+)E", mangled[at:])
    return f"{last}<{', '.join(re.findall(r'Li(-?[0-9]+)E', arguments.group(1)))}>" if arguments else last


def parse(text: str, target: str) -> list[Kernel]:
    """Kernels in the output of ``ptxas -v``."""
    kernels = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        numbers = {
            what: int(found.group(1)) if (found := re.search(pattern, part)) else 0
            for what, pattern in {
                "registers": r"Used (\d+) registers",
                "spill_stores": r"(\d+) bytes spill stores",
                "spill_loads": r"(\d+) bytes spill loads",
                "stack": r"(\d+) bytes stack frame",
                "shared": r"(\d+) bytes smem",
            }.items()
        }
        kernels.append(Kernel(readable(part.split("'", 1)[0]), target, **numbers))
    return kernels


def compile_one(nvcc: str, source: Path, target: str, folder: Path) -> list[Kernel]:
    """Compile a source for a target.

    Raises:
        CheckError: it does not compile, or not without warnings.
    """
    output = folder / f"{source.stem}_{target}.cubin"
    architecture = f"-gencode=arch=compute_{target},code=sm_{target}"
    command = [nvcc, *FLAGS, architecture, "-cubin", "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    name = source.relative_to(ROOT)
    if done.returncode:
        raise CheckError(f"{name} does not compile for sm_{target}:\n{said}")
    if warnings := [line for line in said.splitlines() if "warning" in line.lower()]:
        raise CheckError(f"{name} compiles for sm_{target} with warnings:\n" + "\n".join(warnings))
    return parse(said, target)


def table(kernels: list[Kernel]) -> str:
    """The kernels as text."""
    head = ("kernel", "target", "registers", "spill stores", "spill loads", "stack", "static shared")
    rows = [
        (k.name, f"sm_{k.target}", *map(str, (k.registers, k.spill_stores, k.spill_loads, k.stack, k.shared)))
        for k in kernels
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def main() -> int:
    """Compile, print, judge."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: nvcc is missing, the CUDA kernels were not compiled (set NVCC or CUDA_HOME)")
        return 0
    sources = sorted(path for path in SOURCES.rglob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            found = pool.map(
                lambda job: compile_one(nvcc, *job, Path(folder)), [(s, t) for s in sources for t in TARGETS]
            )
            kernels = sorted((k for of_job in found for k in of_job), key=lambda k: (k.name, TARGETS.index(k.target)))
        except CheckError as error:
            print(f"cuda-check: {error}", file=sys.stderr)
            return 1
    print(table(kernels))
    if bad := [k for k in kernels if k.spill_stores or k.spill_loads or k.stack]:
        names = ", ".join(f"{k.name} (sm_{k.target})" for k in bad)
        print(f"cuda-check: registers spill, or arrays lie in local memory: {names}", file=sys.stderr)
        return 1
    print(f"cuda-check: {len(kernels)} kernels of {len(sources)} sources, no spills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
