"""Tables in docs/accuracy.md are those of the result files."""

from benchmarks.accuracy.losses import ROOT, results
from benchmarks.accuracy.table import page


def test_page_says_what_was_measured():
    text = (ROOT / "docs" / "accuracy.md").read_text()
    assert results()
    assert page(text, results()) == text, "run benchmarks/compare_accuracy.py --write"
