"""tools/sanitize_kernels.py sees the faults that it looks for."""

import shutil

import pytest
import sanitize_kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")


@pytest.mark.parametrize("fault", sanitize_kernels.REPORTS)
def test_a_fault_is_reported_where_it_is(fault: str) -> None:
    report = sanitize_kernels.report_of(fault)
    assert sanitize_kernels.REPORTS[fault] in report
    assert "fault.cpp:" in report


def test_a_compiler_without_sanitizers_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sanitize_kernels, "compiler", lambda: ["g++", "-B/nowhere"])
    monkeypatch.setattr(sanitize_kernels, "report_of", lambda fault: "nothing")
    assert sanitize_kernels.main([]) == 1
    assert "do not report" in capsys.readouterr().err
