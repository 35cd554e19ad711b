"""Which implementation is chosen, and what the log says about it."""

import pytest

from tests.cpu_kernels import has_kernels
from xquant_vllm.attention.dispatch import OVERRIDE_VARIABLE
from xquant_vllm.kivi import dispatch, reference


@pytest.fixture
def override(monkeypatch):
    """Sets the override variable; the choice is made anew."""

    def choose(value: str) -> None:
        monkeypatch.setenv(OVERRIDE_VARIABLE, value)
        dispatch._choose.cache_clear()

    monkeypatch.delenv(OVERRIDE_VARIABLE, raising=False)
    dispatch._choose.cache_clear()
    yield choose
    monkeypatch.undo()
    dispatch._choose.cache_clear()


@pytest.mark.skipif(not has_kernels(), reason="the kernels were not built")
def test_prefers_the_kernels(override) -> None:
    from xquant_vllm.kivi.cpu import kernels as cpu

    assert dispatch.select("cpu") is cpu
    assert "C++ kernels" in dispatch.describe("cpu")


def test_the_reference_can_be_demanded(override) -> None:
    override("reference")
    assert dispatch.select("cpu") is reference
    assert OVERRIDE_VARIABLE in dispatch.describe("cpu")


def test_says_where_there_are_no_kernels(override) -> None:
    assert dispatch.select("xpu") is reference
    assert "there are no kernels for xpu" in dispatch.describe("xpu")
