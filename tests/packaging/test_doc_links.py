"""Links of README.md and docs/ lead to files and headings that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def _anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def _anchors(page: Path) -> list[str]:
    return [_anchor(heading) for heading in re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    wrong = []
    for link in _LINK.findall(_prose(page)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            wrong.append(link)
    assert not wrong, f"{page.name} links to what is not there"


def test_every_page_is_found_from_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {link.partition("#")[0] for link in _LINK.findall(index.read_text())}
    assert {page.name for page in index.parent.glob("*.md")} - {index.name} <= linked


def test_every_picture_is_shown_by_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert not [path.name for path in (ROOT / "docs").glob("*.png") if f"{path.name})" not in text]
