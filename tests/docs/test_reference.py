"""Pages that are written from the code are up to date."""

import re

from write_reference import pages

from tests.docs.pages import ROOT


def test_they_say_what_the_code_says():
    old = [path.name for path, text in pages().items() if path.read_text() != text]
    assert old == [], "run make reference"


def test_no_variable_of_the_environment_is_left_out():
    source = "".join(path.read_text() for path in (ROOT / "xquant_vllm").rglob("*.py"))
    named = set(re.findall(r'"(XQUANT_[A-Z_]+)"', source))
    assert named
    text = (ROOT / "docs" / "settings.md").read_text()
    assert {name for name in named if name not in text} == set()
