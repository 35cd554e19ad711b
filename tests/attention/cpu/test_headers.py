"""Headers of csrc/cpu include what they need, and what they define stays in the file that includes them."""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cpu"
# Needs the macros of the file that includes it.
TABLE = SOURCES / "kernels_impl.h"
HEADERS = sorted(path for path in SOURCES.rglob("*.h") if path != TABLE)
FLAGS = ["-std=c++17", "-fopenmp", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
# What is compiled differs by these: no vector instructions but the compiler's own, and all of them.
EXTENSIONS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512vbmi")
AMX = ("amx-tile", "amx-int8", "amx-bf16", "avx512bf16")
ISAS = {
    "portable": [],
    "vnni": [f"-m{name}" for name in EXTENSIONS],
    "amx": [f"-m{name}" for name in (*EXTENSIONS, *AMX)],
    "amx-emulated": ["-DXQUANT_EMULATE_TILES", *(f"-m{name}" for name in EXTENSIONS)],
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")


def compiles(header: Path, isa: str) -> str:
    """What g++ says of a file that includes the header twice and nothing else."""
    command = ["g++", *FLAGS, *ISAS[isa], "-fsyntax-only", "-x", "c++", "-"]
    text = f'#include "{header}"\n' * 2
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return f"{header.relative_to(SOURCES)}: {done.stderr}" if done.returncode else ""


@pytest.mark.parametrize("isa", ISAS)
def test_every_header_compiles_alone(isa: str) -> None:
    if isa != "portable" and platform.machine() != "x86_64":
        pytest.skip("only x86-64 has these instructions")
    # Elsewhere the instruction set changes nothing: a header says what it needs of it by these macros.
    macros = {"portable": "", "vnni": "__AVX512"}.get(isa, "TILES")
    headers = [header for header in HEADERS if macros in header.read_text()]
    assert len(headers) > 5
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda header: compiles(header, isa), headers))
    assert not any(said), "\n".join(filter(None, said))


def test_kernels_share_no_functions(tmp_path: Path) -> None:
    """Else the linker would keep one for all instruction sets: an object file defines its table and nothing more."""
    target = tmp_path / "portable.o"
    subprocess.run(["g++", *FLAGS, "-c", str(SOURCES / "kernels_portable.cpp"), "-o", str(target)], check=True)
    listed = subprocess.run(["nm", "-gC", "--defined-only", str(target)], capture_output=True, text=True, check=True)
    names = [line.split(maxsplit=2)[2] for line in listed.stdout.splitlines()]
    assert names == ["xquant::kPortableKernels"]
