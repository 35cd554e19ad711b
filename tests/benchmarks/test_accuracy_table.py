"""Tables in docs/accuracy.md are those of the result files."""

import json

from benchmarks.accuracy.table import page
from benchmarks.compare_accuracy import RESULTS, ROOT


def test_page_says_what_was_measured():
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    text = (ROOT / "docs" / "accuracy.md").read_text()
    assert results
    assert page(text, results) == text, "run benchmarks/compare_accuracy.py --write"
