"""Which implementation is chosen, and what the log says about it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import xquant_vllm
from xquant_vllm.attention import dispatch, reference

PACKAGE = Path(xquant_vllm.__file__).parent
HAS_KERNELS = (PACKAGE / "attention" / "cpu" / "_cpu_kernels.so").is_file()
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the kernels were not built")


@pytest.fixture
def override(monkeypatch):
    """Sets the override variable; the choice is made anew."""

    def choose(value: str) -> None:
        monkeypatch.setenv(dispatch.OVERRIDE_VARIABLE, value)
        dispatch._choose.cache_clear()

    monkeypatch.delenv(dispatch.OVERRIDE_VARIABLE, raising=False)
    dispatch._choose.cache_clear()
    yield choose
    monkeypatch.undo()
    dispatch._choose.cache_clear()
    if HAS_KERNELS:
        from xquant_vllm.attention.cpu import library as cpu

        cpu.set_isa(None)


@needs_kernels
def test_prefers_the_kernels(override) -> None:
    from xquant_vllm.attention.cpu import kernels, library

    assert dispatch.select("cpu") is kernels
    assert library.isa() in dispatch.describe()
    assert "\n" not in dispatch.describe()


def test_other_devices_take_the_reference(override) -> None:
    assert dispatch.select("xpu") is reference
    assert "xpu" in dispatch.describe("xpu")


def test_reference_on_demand(override) -> None:
    override("reference")
    assert dispatch.select("cpu") is reference
    assert dispatch.OVERRIDE_VARIABLE in dispatch.describe()


@needs_kernels
def test_isa_on_demand(override) -> None:
    override("portable")
    assert dispatch.describe() == "attention runs on the C++ kernels for portable"


def test_unknown_demand(override) -> None:
    override("fast")
    with pytest.raises(ValueError, match="portable, avx2, avx512"):
        dispatch.select("cpu")


def _describe_elsewhere(folder: Path, library: bytes | None, **environment: str) -> subprocess.CompletedProcess:
    """Describe a copy of the package that has this library, or none."""
    copy = folder / "xquant_vllm"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library is not None:
        (copy / "attention" / "cpu" / "_cpu_kernels.so").write_bytes(library)
    script = "import xquant_vllm.attention.dispatch as d; print(d.select('cpu').__name__); print(d.describe())"
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("library", [None, b"no library"], ids=["missing", "broken"])
def test_falls_back(tmp_path: Path, library: bytes | None) -> None:
    done = _describe_elsewhere(tmp_path, library)
    assert done.returncode == 0, done.stderr
    name, text = done.stdout.splitlines()
    assert name == "xquant_vllm.attention.reference"
    assert "slower" in text
    assert "install g++" in text


def test_demand_without_library(tmp_path: Path) -> None:
    done = _describe_elsewhere(tmp_path, None, **{dispatch.OVERRIDE_VARIABLE: "avx2"})
    assert done.returncode != 0
    assert "XQUANT_ATTENTION_KERNELS=avx2 cannot be met" in done.stderr


def test_cuda_takes_triton() -> None:
    from xquant_vllm.attention.gpu import kernels

    assert dispatch.select("cuda") is kernels
    assert "Triton" in dispatch.describe("cuda")
