"""`make docs` builds the site, and fails where something leads nowhere or is elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docsite.check import check_site

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def build(folder):
    """MkDocs' exit status and what it says, as `make docs` calls it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    for name in ("docs", "tools/docsite", "tools/figures"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "pyproject.toml", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_site_is_built_whole(copy):
    status, said = build(copy)
    assert status == 0, said
    site = copy / "build" / "site"
    pages = {path.relative_to(copy / "docs").with_suffix(".html") for path in (copy / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    page = (site / "how-it-works.html").read_text()
    for drawing in (copy / "docs" / "pictures").glob("*.svg"):
        assert f"pictures/{drawing.name}#only-light" in page
        assert f"pictures/{drawing.stem}-dark.svg#only-dark" in page
        assert (site / "pictures" / f"{drawing.stem}-dark.svg").read_text() != drawing.read_text()


WRONG = {
    "[a](no.md)": "no.md",
    "[a](choosing.md#no-such-section)": "no-such-section",
    '<a href="no-page.html">a</a>': "glossary.html links to no-page.html, which is not there",
    '<img src="https://example.org/a.png">': "glossary.html fetches https://example.org/a.png, which is elsewhere",
}


def test_what_is_not_there_or_elsewhere_is_an_error(copy):
    page = copy / "docs" / "glossary.md"
    page.write_text("\n\n".join([page.read_text(), *WRONG]))
    (copy / "docs" / "forgotten.md").write_text("# Forgotten\n")
    status, said = build(copy)
    assert status != 0
    assert [message for message in WRONG.values() if message not in said] == []
    assert re.search(r"not included in the .nav.[^*]*forgotten\.md", said)


def test_the_check_finds_what_is_wrong(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="here">a</h1><a href="#here">1</a><a href="b/c.html#there">2</a>')
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.html").write_text('<a href="../a.html#gone">3</a><img src="//example.org/x.png">')
    assert check_site(tmp_path) == [
        "a.html links to b/c.html#there, which is not there",
        "b/c.html fetches //example.org/x.png, which is elsewhere",
        "b/c.html links to ../a.html#gone, which is not there",
    ]
