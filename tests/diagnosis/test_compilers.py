"""Compilers that are there, are not, or fail."""

from xquant_vllm.diagnosis.compilers import compilers


def test_compilers_that_are_there(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("#!/bin/sh\necho mine 1.0\n")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", f"{tmp_path / 'mine'} -O1")
    found = compilers()
    assert found["g++"]["command"] == f"{tmp_path / 'mine'} -O1"
    assert found["g++"]["version"] == "mine 1.0"
    assert all(of["needed_for"] for of in found.values())


def test_no_compilers(tmp_path, monkeypatch):
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = compilers()
    assert {found[name]["command"] for name in ("g++", "cc")} == {None}


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "mine"))
    assert compilers()["g++"]["command"] is None
