"""docs/index.md leads to every page, and every picture is shown by one."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
INDEX = DOCS / "index.md"
_LINK = re.compile(r"\]\(([^)\s#]+)[^)\s]*\)")


def test_every_page_is_found_from_the_index():
    pages = {page.name for page in DOCS.glob("*.md")}
    assert pages - {INDEX.name} <= set(_LINK.findall(INDEX.read_text()))


def test_every_picture_is_shown_by_a_page():
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    shown = {Path(link).name for page in pages for link in _LINK.findall(page.read_text())}
    pictures = {path.name for path in DOCS.glob("*.png")}
    assert pictures
    assert pictures <= shown
