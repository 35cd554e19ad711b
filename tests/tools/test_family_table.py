"""docs/families.md says what the tests cover, no more and no less; how its table is made."""

import re
from functools import cache
from pathlib import Path

import family_table
import pytest
from family_table import DOCUMENT_PATH, check_features, merge, render, replace_table

from tests.family_coverage import covered_by

TESTS = Path(__file__).parent.parent


class Collector:
    def __init__(self):
        self.pairs = []

    def pytest_collection_finish(self, session):
        self.pairs += [pair for item in session.items for pair in covered_by(item)]

    def pytest_deselected(self, items):
        self.pairs += [pair for item in items if item.get_closest_marker("nightly") for pair in covered_by(item)]


@cache
def marked_families(tests: Path) -> dict[str, set[str]]:
    """What all tests below a folder are marked to cover."""
    marked = [
        str(path)
        for path in sorted(tests.rglob("test_*.py"))
        if re.search(r"mark\.covers|\bcovering\(", path.read_text())
    ]
    collector = Collector()
    # In this process, where the modules are imported already. Nothing runs.
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:xdist"]
    assert pytest.main([*options, *marked], plugins=[collector]) == 0
    return merge(collector.pairs)


def test_the_document_lists_what_tests_are_marked_to_cover():
    """All marked tests must pass, so what they are marked with is what the last run of all tests covered."""
    document = DOCUMENT_PATH.read_text()
    expected = replace_table(document, render(marked_families(TESTS)))
    assert document == expected, "run `make test`, then `make families-write`, and commit docs/families.md"


def test_a_cell_lists_values_in_the_order_of_the_columns():
    table = render(merge([("B", "bits=4"), ("B", "bits=8"), ("a", "bias"), ("a", "rope=yarn"), ("C", "refused")]))
    lines = table.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| a", "| B"]
    columns = lines[0].split(" | ")
    cells = [line.split(" | ") for line in lines[2:4]]
    assert cells[0][columns.index("bias")] == "yes"
    assert cells[0][columns.index("rope")] == "yarn"
    assert cells[1][columns.index("bits")] == "8, 4"
    assert lines[-1] == "* C"


def test_a_mistyped_feature_is_refused():
    with pytest.raises(ValueError, match=r"test_x is marked to cover 'rope=yam', which tools/family_table\.py has no"):
        check_features("test_x", ["bias", "rope=yam"])


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """Runs the tool on the outcomes of three tests; its exit status and what it printed."""
    monkeypatch.setattr(family_table, "ROOT", tmp_path)
    monkeypatch.setattr(family_table, "COVERAGE_PATH", tmp_path / "families.json")
    monkeypatch.setattr(family_table, "DOCUMENT_PATH", tmp_path / "families.md")
    (tmp_path / "families.md").write_text(f"before\n{family_table.BEGIN}\n{family_table.END}\nafter\n")

    def tool(*arguments, outcome=None):
        if outcome is not None:
            tests = {"test_y": {"outcome": "passed", "covers": [["A", "bias"]]}}
            tests["test_x"] = {"outcome": outcome, "covers": [["A", "qk-norm"]]}
            (tmp_path / "families.json").write_text(family_table.json.dumps(tests))
        monkeypatch.setattr("sys.argv", ["family_table.py", *arguments])
        status = family_table.main()
        return status, "".join(capsys.readouterr())

    return tool


def test_the_tool_writes_and_checks(tool, tmp_path):
    assert tool()[1].strip().endswith("run `make test` first")
    status, printed = tool(outcome="passed")
    assert (status, "run `make test`, then `make families-write`" in printed) == (1, True)
    assert tool("--write")[0] == 0
    assert tool()[0] == 0
    document = (tmp_path / "families.md").read_text()
    assert document.startswith("before\n")
    assert document.endswith("after\n")
    assert "| A |" in document


@pytest.mark.parametrize(("outcome", "checked"), [("failed", 1), ("skipped", 0)])
def test_the_tool_writes_only_what_passed(tool, outcome, checked):
    tool("--write", outcome="passed")
    status, printed = tool("--write", outcome=outcome)
    assert status == 1
    assert "test_x did not pass" in printed
    assert tool()[0] == checked


def test_tests_left_to_another_run_count(tool):
    tool("--write", outcome="passed")
    status, printed = tool(outcome="nightly")
    assert status == 0
    assert "1 left to `make test-nightly`" in printed
