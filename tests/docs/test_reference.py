"""Pages that are written from the code are up to date."""

from write_reference import pages


def test_they_say_what_the_code_says():
    old = [path.name for path, text in pages().items() if path.read_text() != text]
    assert old == [], "run make reference"
