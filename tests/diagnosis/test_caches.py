"""Folders of caches: where they are, and whether they can be written; looking leaves nothing behind."""

import os

from xquant_vllm.diagnosis.caches import caches, describe_folder


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
