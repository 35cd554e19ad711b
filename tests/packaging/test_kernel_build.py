"""Which instruction sets the kernels are built with; the compiler is a script that makes empty files."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = """#!/bin/sh
case "$AMX $*" in no*-mamx-tile*) echo "error: unrecognized command-line option" >&2; exit 1;; esac
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done
"""

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has AMX")


@pytest.fixture
def build(tmp_path: Path):
    """Builds in a copy of what is needed; returns what was said."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "xquant_vllm").mkdir()
    shutil.copy(ROOT / "xquant_vllm" / "__init__.py", tmp_path / "xquant_vllm")  # has the version
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)

    def run(*options: str, amx: str = "yes") -> str:
        environment = {**os.environ, "CXX": str(compiler), "AMX": amx, "XQUANT_BUILD_KERNELS": "1"}
        command = [sys.executable, "setup.py", "--quiet", "build_kernels", *options]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_source_tree_has_the_emulated_set(build) -> None:
    said = build("--inplace")
    assert "kernels_amx.cpp" in said
    assert "kernels_amx_emulated.cpp" in said


def test_a_wheel_has_not(build, tmp_path: Path) -> None:
    said = build("--build-lib", str(tmp_path / "wheel"))
    assert "kernels_amx.cpp" in said
    assert "kernels_amx_emulated.cpp" not in said


def test_a_compiler_without_amx(build) -> None:
    """The library is built without it, and says so."""
    said = build("--inplace", amx="no")
    assert "does not know AMX, building without it" in said
    assert "kernels_amx.cpp" not in said
    assert "kernels_vnni.cpp" in said
    assert "kernels_amx_emulated.cpp" in said
