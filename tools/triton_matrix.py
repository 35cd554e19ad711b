#!/usr/bin/env python3
"""Compile the Triton kernels by every version of Triton that vLLM may bring, and interpret a few tests.

vLLM 0.33 pins torch 2.14 and so Triton 3.8, torch 2.13 has 3.7.1. Wheels are put into build/triton, a folder a version
(0.7 to 0.9 GB unpacked), and stay there; .venv is left alone. No GPU is needed. The last line is JSON.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "triton"
VERSIONS = ("3.7.1", "3.8.0", "3.9.0")
CAPABILITIES = (80, 90, 100)
MODULES = ("tests.attention.gpu.compile_cases", "tests.kivi.gpu.compile_cases")
# A little of every kernel: attention that decodes and prefills, stores, hot blocks, KIVI.
INTERPRETED = (
    "tests/attention/gpu/test_paged_attention.py::test_decodes_and_prefills",
    "tests/attention/gpu/test_paged_attention.py::test_16_bit_operands",
    "tests/attention/gpu/store/test_store.py::test_bits",
    "tests/attention/gpu/store/test_store.py::test_prediction",
    "tests/attention/gpu/hot/test_write.py::test_many_tokens",
    "tests/kivi/gpu/test_kernels.py::test_special",
)


def installed(version: str) -> Path | None:
    """The folder of a version, with its wheel in it; None where .venv has this version."""
    if importlib.metadata.version("triton") == version:
        return None
    folder = FOLDER / version
    if not (folder / "triton" / "__init__.py").is_file():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"triton=={version}"],
            check=True,
        )
    return folder


def environment(version: str) -> dict[str, str]:
    """Of processes that import a version, each with a cache of its own."""
    paths = [path for path in (installed(version), ROOT) if path is not None]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TRITON_CACHE_DIR": str(FOLDER / f"cache-{version}"),
        "OMP_NUM_THREADS": "1",
    }


def compile_all(version: str, capability: int) -> list[dict[str, Any]]:
    """What the cases are compiled to.

    Raises:
        SystemExit: one does not compile, or Triton warns.
    """
    kernels = []
    for module in MODULES:
        done = subprocess.run(
            [sys.executable, "-m", "tests.attention.gpu.compiled", module, str(capability)],
            cwd=ROOT, env=environment(version), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode or "Warning" in done.stderr:
            raise SystemExit(f"Triton {version}, compute capability {capability}:\n{done.stderr[-4000:]}")
        kernels += [json.loads(line) for line in done.stdout.splitlines()]
    return kernels


def interpret(version: str, tests: list[str]) -> str:
    """Run tests in Triton's interpreter; returns pytest's last line.

    Raises:
        SystemExit: one fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests],
        cwd=ROOT, env=environment(version) | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"Triton {version}, interpreted:\n{done.stdout[-4000:]}")
    return done.stdout.splitlines()[-1].strip("= ")


def summary(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the kernels of a version and a compute capability."""
    spilled: dict[str, int] = defaultdict(int)
    for of in kernels:
        if of["stack"]:
            spilled[of["kernel"]] = max(spilled[of["kernel"]], of["stack"])
    return {
        "kernels": len(kernels),
        "most_shared": max(of["shared"] for of in kernels),
        "spilled": dict(spilled),
        "fused_stores": sum(of["fused"] for of in kernels if of["case"].startswith("store")),
    }


def main() -> None:
    """Go through the matrix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", nargs="+", choices=VERSIONS, default=VERSIONS)
    parser.add_argument("--capability", nargs="+", type=int, choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--tests", nargs="+", default=list(INTERPRETED), help="what is interpreted")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for version in options.version:
        of_version = found[version] = {"interpreted": interpret(version, options.tests)}
        print(f"Triton {version}: {of_version['interpreted']}", flush=True)
        for capability in options.capability:
            of_version[str(capability)] = summary(compile_all(version, capability))
            print(f"Triton {version}, {capability}: {of_version[str(capability)]}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
