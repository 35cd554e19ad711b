"""Figures in docs/benchmarks.md are those of the result files."""

import json

from benchmarks.results_page import PAGE, RESULTS, page


def test_page_says_what_was_measured() -> None:
    text = PAGE.read_text()
    assert "<!-- table: " in text
    assert page(text, RESULTS) == text


def test_tables_are_replaced(tmp_path) -> None:
    row = {"model": "m", "shape": "8 x 512", "variant": "v", "roof": 0.5, "binding": "memory",
           "microseconds": {"median": 1.0, "low": 0.5, "high": 2.0},
           "speed_of_baseline": {"median": 0.9, "low": 0.8, "high": 1.0}}  # fmt: skip
    machine = {"processor": "p", "threads": 2, "instruction_set": "vnni", "versions": {"torch": "2"}, "commit": "abc",
               "date": "2026-01-01"}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"benchmark": "store", "rows": [row], "machine": machine}))
    text = "before\n<!-- table: a.json -->\nold\n<!-- end of table -->\nafter"
    new = page(text, tmp_path)
    assert "| m | 8 x 512 | v | 1 (0-2) | 0.90 (0.80-1.00) | 50%, memory |" in new
    assert "commit abc" in new
    assert "old" not in new
    assert page(new, tmp_path) == new
