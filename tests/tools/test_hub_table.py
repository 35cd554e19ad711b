"""The support matrix of docs/families.md: made from what was found, of all families that are known."""

import json
import re

import hub_table
import pytest

from tests.model_hub.catalogue import FAMILIES, results
from tests.tools.test_family_table import TESTS, marked_families


def test_the_page_says_what_was_found():
    document = hub_table.DOCUMENT_PATH.read_text()
    expected = hub_table.replace_table(document, hub_table.render(json.loads(hub_table.RESULTS_PATH.read_text())))
    assert document == expected, "run `make families-write`"


def test_every_family_that_was_tried_is_as_it_is_known():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    known = {of.name: (list(of.models), of.architecture) for of in FAMILIES}
    found = {name: (of["models"], of["architecture"]) for name, of in results().items()}
    assert found.items() <= known.items(), "run `make families-all`"


def test_what_every_run_of_the_tests_tries_is_in_the_matrix():
    assert {of.name for of in FAMILIES if of.quick} <= results().keys(), "run `make families-all`"


def test_families_that_tests_serve_are_in_the_matrix_by_their_names_on_the_hub():
    marked = [name for name, features in marked_families(TESTS).items() if features != {"refused"}]
    # "Qwen2-VL, text alone", "Granite 4 (hybrid)" and "DBRX with `clip_qkv`" are special cases of a family.
    served = {re.split(r",| \(| with `| without ", name)[0] for name in marked}
    unknown = served - results().keys()
    assert not unknown, f"{sorted(unknown)}: add them to tests/model_hub with the names of their models"


ONE = {"models": ["a/b", "a/c"], "architecture": "AForCausalLM"}
FOUND = {"family": "A", "outcome": "served", "why": "", "change": 0.01}


def test_a_row_for_each():
    refused = {**ONE, "outcome": "refused", "why": "x | y", "change": None}
    table = hub_table.render(
        {"vllm": "1", "transformers": "2", "families": {"b": refused, "A": {**ONE, **FOUND}}},
    ).splitlines()
    assert table[0].startswith("Of 2 families 1 are served, 1 are refused, and of 0 the tiny checkpoint")
    assert table[-2] == "| A | a/b, a/c | `AForCausalLM` | served |"
    assert table[-1] == "| b | a/b, a/c | `AForCausalLM` | refused: x / y |"


def test_what_is_found_is_taken_and_what_has_changed_is_said():
    results = {"families": {"A": {**ONE, "outcome": "refused", "why": "w", "change": None}, "old": {**ONE}}}
    known = {"A": ONE, "B": ONE, "C": ONE}
    changes = hub_table.take(results, known, [FOUND, {**FOUND, "family": "B"}])
    assert list(results["families"]) == ["A", "B"]
    assert results["families"]["A"] == {**ONE, "outcome": "served", "why": "", "change": 0.01}
    assert changes[0] == "A: refused -> served"
    assert changes[1] == "B: unknown -> served"


@pytest.mark.parametrize("options", [[], ["--write"]])
def test_the_tool_checks_and_writes(tmp_path, monkeypatch, capsys, options):
    page = tmp_path / "families.md"
    page.write_text(f"before\n{hub_table.BEGIN}\n{hub_table.END}\nafter\n")
    monkeypatch.setattr(hub_table, "DOCUMENT_PATH", page)
    monkeypatch.setattr("sys.argv", ["hub_table.py", *options])
    assert hub_table.main() == (0 if options else 1)
    assert ("run `make families-write`" in capsys.readouterr().err) == (not options)
    assert ("| Llama |" in page.read_text()) == bool(options)
