"""The next vLLM's Python over the installed one's compiled parts."""

import subprocess

import pytest
from next_vllm import NEXT, call_it_cpu, link_compiled

from tests.docs.pages import ROOT
from xquant_vllm.plugin.compat import unsupported_reason


def test_compiled_parts_are_linked(tmp_path):
    installed, package = tmp_path / "installed", tmp_path / "next" / "vllm"
    for name in ("_C.abi3.so", "deep/er.so", "python.py"):
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text(name)
    package.mkdir(parents=True)
    assert link_compiled(installed, package) == link_compiled(installed, package) == ["_C.abi3.so", "deep/er.so"]
    assert (package / "deep" / "er.so").read_text() == "deep/er.so"
    assert not (package / "python.py").exists()


def test_its_version_is_that_of_a_cpu(tmp_path):
    (tmp_path / "vllm").mkdir()
    metadata = tmp_path / f"vllm-{NEXT}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.4\nName: vllm\nVersion: {NEXT}\nRequires-Dist: torch\n")
    code = tmp_path / "vllm" / "_version.py"
    code.write_text(f"version: str\n\n__version__ = version = '{NEXT}'\n")
    for _ in range(2):
        call_it_cpu(tmp_path)
        assert f"\nVersion: {NEXT}+cpu\n" in metadata.read_text()
        assert f"version = '{NEXT}+cpu'\n" in code.read_text()


def test_it_is_supported():
    assert unsupported_reason(NEXT) is None


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_next_vllm():
    done = subprocess.run(["make", "test-next-vllm"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
