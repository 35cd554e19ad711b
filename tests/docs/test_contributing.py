"""CONTRIBUTING.md and CHANGELOG.md say what is so."""

import re

import pytest

from tests.docs.pages import ROOT
from tests.docs.test_paths import exists, paths
from xquant_vllm import __version__

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
ADDITIONS = ("model family", "page format", "kernel", "setting", "method to `xquant eval`")
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("thing", ADDITIONS)
def test_how_to_add_a_thing_is_a_list_of_files(thing):
    section = re.split(r"^## ", CONTRIBUTING.split(f"\n## Add a {thing}\n")[1], flags=re.M)[0]
    items = re.findall(r"^\* (.*)$", section, re.M)
    assert len(items) >= 5
    for item in items:
        named, _, what = item.partition(": ")
        assert what, f"{item}: what goes there?"
        assert paths(named), f"{item}: which file?"
        assert [path for path in paths(named) if not exists(path)] == []


def test_it_says_what_ci_runs():
    steps = re.findall(r"^step (.*)$", (ROOT / ".ci" / "run").read_text(), re.M)
    targets = {word for step in steps for word in step.split() if not word.startswith("-")}
    assert targets
    assert {target for target in targets - {"test-models"} if f"`make {target}`" not in CONTRIBUTING} == set()


def test_the_newest_version_of_the_changelog_is_the_packages():
    versions = re.findall(r"^## \[(.*?)\](.*)$", CHANGELOG, re.M)
    assert versions[0] == ("Unreleased", "")
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in versions[1:])
    assert versions[1][0] == __version__


def test_the_changelog_has_the_usual_sections():
    assert set(re.findall(r"^### (.*)$", CHANGELOG, re.M)) <= KINDS
    for section in re.split(r"^### ", CHANGELOG, flags=re.M)[1:]:
        assert re.search(r"^- ", section, re.M), f"nothing is under {section.splitlines()[0]}"
