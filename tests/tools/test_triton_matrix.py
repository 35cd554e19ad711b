"""tools/triton_matrix.py, without downloads."""

import importlib.metadata
import os
from pathlib import Path

from tools import triton_matrix as matrix


def test_covers_what_is_installed() -> None:
    version = importlib.metadata.version("triton")
    assert version in matrix.VERSIONS
    assert matrix.installed(version) is None


def test_other_versions_come_first_and_keep_their_own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "3.7.1" / "triton").mkdir(parents=True)
    (tmp_path / "3.7.1" / "triton" / "__init__.py").touch()
    environment = matrix.environment("3.7.1")
    assert environment["PYTHONPATH"] == f"{tmp_path / '3.7.1'}{os.pathsep}{matrix.ROOT}"
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / "cache-3.7.1")
    assert "TRITON_INTERPRET" not in environment


def test_its_tests_exist() -> None:
    for test in matrix.INTERPRETED:
        path, name = test.split("::")
        assert f"def {name}(" in (matrix.ROOT / path).read_text()


def test_summary() -> None:
    kernels = [
        {"kernel": "attend", "case": "decode x", "stack": 8, "shared": 100, "fused": True},
        {"kernel": "attend", "case": "decode y", "stack": 16, "shared": 200, "fused": True},
        {"kernel": "quantize", "case": "store x", "stack": 0, "shared": 0, "fused": False},
    ]
    assert matrix.summary(kernels) == {
        "kernels": 3, "most_shared": 200, "spilled": {"attend": 16}, "fused_stores": 0,
    }  # fmt: skip
