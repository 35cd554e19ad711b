"""Lays the Python of the next vLLM over the compiled parts of the installed one: `make test-next-vllm`.

The next vLLM is not there for CPUs yet. Its source distribution (47 MB) is installed without anything compiled, beside
the environment, and the kernels of the installed vLLM are linked into it. What is tried so is Python against Python:
the seams of this package, model runner V2 and start-up. Kernels that changed with their callers would show as errors.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
NEXT = "0.33.0"
# What its build asks for; with the target "empty" nothing is compiled.
BUILD_TOOLS = ("setuptools-rust", "setuptools-scm", "vcs-versioning", "semantic-version", "wheel")


def install(target: Path, environment: dict[str, str], *arguments: str) -> None:
    """Install into a folder, without what packages depend on."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *arguments]
    subprocess.run(command, env={**os.environ, **environment}, check=True, stdin=subprocess.DEVNULL)


def link_compiled(installed: Path, package: Path) -> list[str]:
    """Link the compiled parts of one vLLM into another; returns their names."""
    found = sorted(path.relative_to(installed) for path in installed.rglob("*.so"))
    for name in found:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).unlink(missing_ok=True)
        (package / name).symlink_to(installed / name)
    return [str(name) for name in found]


def call_it_cpu(folder: Path) -> None:
    """Name the version as vLLM for CPUs does, by which vLLM finds its platform."""
    for path in (folder / "vllm" / "_version.py", *folder.glob("vllm-*.dist-info/METADATA")):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(rf"(?m)^(.*[Vv]ersion.*){re.escape(NEXT)}(?!\+)", rf"\g<1>{NEXT}+cpu", text, count=1))


def lay(folder: Path) -> None:
    """Make the folder for PYTHONPATH, or keep the one there."""
    done = folder / f".{NEXT}-over-{version('vllm')}"
    if done.exists():
        return
    if folder.exists():
        shutil.rmtree(folder)
    tools = folder / "build-tools"
    install(tools, {}, *BUILD_TOOLS)
    environment = {
        "VLLM_TARGET_DEVICE": "empty",
        "VLLM_VERSION_OVERRIDE": NEXT,
        "PYTHONPATH": str(tools),
    }
    install(folder, environment, "--no-compile", "--no-build-isolation", "--no-binary", "vllm", f"vllm=={NEXT}")
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    names = link_compiled(Path(spec.origin).parent, folder / "vllm")
    call_it_cpu(folder)
    done.touch()
    print(f"Python of vLLM {NEXT} over {', '.join(names)} of {version('vllm')}: {folder}")


if __name__ == "__main__":
    lay(PROJECT / "build" / "next-vllm")
