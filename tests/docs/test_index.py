"""docs/index.md leads to every page, and every picture is shown by one."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
INDEX = DOCS / "index.md"
_LINK = re.compile(r"\]\(([^)\s#]+)[^)\s]*\)")


def linked(page: Path) -> set[Path]:
    """Files that a page links to or shows."""
    return {(page.parent / link).resolve() for link in _LINK.findall(page.read_text()) if "://" not in link}


def test_every_page_is_found_from_the_index():
    pages = set(DOCS.rglob("*.md")) - {INDEX}
    assert len(pages) > 10
    assert pages <= linked(INDEX)


def test_every_picture_is_shown_by_a_page():
    shown = set().union(*map(linked, (DOCS.parent / "README.md", *DOCS.rglob("*.md"))))
    pictures = set(DOCS.rglob("*.png")) | set(DOCS.rglob("*.svg"))
    assert pictures
    assert pictures <= shown
