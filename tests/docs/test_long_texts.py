"""Tables of docs/long-texts.md are those of the result files."""

from benchmarks.accuracy.long_tables import PAGE, page


def test_page_says_what_was_measured():
    text = PAGE.read_text()
    assert page(text) == text, "run benchmarks/accuracy/long_tables.py"
