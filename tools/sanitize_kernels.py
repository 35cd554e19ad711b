"""Test the C++ kernels for CPUs under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

The package is copied to build/sanitized, its kernels are compiled there with -fsanitize, and their tests run on the
copy: what is built for use stays as it is. A read or write outside of a tensor or of scratch memory, an overflow of a
signed number or a misaligned pointer ends the run with a report that names file and line. First it is tried whether
such a fault would be seen at all. Memory that is not freed is not looked for: Python frees little before it ends.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
COPY = PROJECT / "build" / "sanitized"
_COPIED = ("xquant_vllm", "csrc", "tests", "benchmarks", "examples", "tools", "setup.py", "pyproject.toml", "README.md",
           "LICENSE")  # fmt: skip
# Every kernel, in every instruction set of this machine, on every page format. Not what starts a process of its own,
# nor the policy of hot blocks, which runs no kernel.
TESTS = ("tests/attention/cpu", "tests/attention/hot", "tests/kivi/cpu")
_NOT_HERE = "not threads and not headers and not test_policy"
_PROCESSES = min(2, os.cpu_count() or 1)
SANITIZERS = "address,undefined,float-cast-overflow"
# Optimized as little as keeps compiling and running short.
_FLAGS = f"-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover={SANITIZERS}"
_FAULT = """
#include <cstdint>
extern "C" int outside(const uint8_t* memory, int at) { return memory[at]; }
extern "C" int overflow(int number) { return number + 1; }
"""
_CALL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
memory = ctypes.CDLL(None).malloc
memory.restype = ctypes.c_void_p
if sys.argv[2] == "outside":
    library.outside(ctypes.c_void_p(memory(64)), 64)
else:
    library.overflow(0x7FFFFFFF)
"""
REPORTS = {"outside": "heap-buffer-overflow", "overflow": "signed integer overflow"}


class SanitizeError(Exception):
    """The kernels cannot be tested here; the message says why."""


def compiler() -> list[str]:
    """The compiler with its sanitizers."""
    return [*(shlex.split(os.environ.get("CXX", "")) or ["g++"]), f"-fsanitize={SANITIZERS}"]


def runtimes() -> list[str]:
    """The sanitizers' libraries, which must be in the process before Python: it was not compiled with them.

    Raises:
        SanitizeError: the compiler has none.
    """
    found = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            raise SanitizeError(f"{compiler()[0]} has no {name}; install its sanitizers (they come with GCC)")
        found.append(path)
    return found


def environment() -> dict[str, str]:
    """Of a process that loads a library that was compiled with sanitizers."""
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def report_of(fault: str) -> str:
    """What a process writes that runs into one of the faults of ``REPORTS``."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fault.cpp"), Path(folder, "fault.so")
        source.write_text(_FAULT)
        flags = [*compiler(), *_FLAGS.split(), "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(flags, check=True)
        command = [sys.executable, "-c", _CALL, str(library), fault]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False).stderr


def build() -> None:
    """Copy the package, and compile its kernels with sanitizers in the copy."""
    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir(parents=True)
    for name in _COPIED:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, COPY / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
        else:
            shutil.copy2(source, COPY / name)
    build_environment = {
        **os.environ,
        "XQUANT_BUILD_KERNELS": "1",
        "CXX": shlex.join(compiler()),
        "CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} {_FLAGS}",
    }
    command = [sys.executable, "setup.py", "--quiet", "build_kernels", "--inplace"]
    subprocess.run(command, cwd=COPY, env=build_environment, check=True)


def run_tests(more: list[str]) -> int:
    """Run the kernels' tests on the copy; returns pytest's exit code."""
    # What the sanitizers write just before they end a process must not be captured with it.
    options = ["-q", "-p", "no:cacheprovider", "--capture=sys", "-n", str(_PROCESSES), "-k", _NOT_HERE]
    command = [sys.executable, "-m", "pytest", *options, *TESTS, *more]
    return subprocess.run(command, cwd=COPY, env={**environment(), "PYTHONPATH": str(COPY)}, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """Build and test; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pytest", nargs="*", metavar="OPTION", help="more options for pytest, after --")
    options = parser.parse_args(arguments)
    try:
        for fault, words in REPORTS.items():
            if words not in report_of(fault):
                raise SanitizeError(f"the sanitizers of {compiler()[0]} do not report a {words}")
        build()
    except (SanitizeError, subprocess.CalledProcessError) as error:
        print(f"sanitize: {error}", file=sys.stderr)
        return 1
    return run_tests(options.pytest)


if __name__ == "__main__":
    sys.exit(main())
