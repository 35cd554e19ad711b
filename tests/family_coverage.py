"""What the tests cover of model families and features, for the table in docs/families.md.

Mark a test (or a parameter of one) with a family and the features that it would fail without::

    @pytest.mark.covers("Gemma 3", "prefix caching", "rope=linear", *LATENTS, "bits=8")

and run ``make test``, then ``make families-write``. Families are free text, one row each. Features are those of
``FEATURES`` in ``tools/family_table.py`` (a new one is added there), ``name`` or ``name=value``: for the cross-layer
method or for pages of X write ``"method=xquant-cl"`` or ``"cache=x"`` instead of ``*LATENTS``. A model that is refused
at start-up has the only feature ``"refused"``.

Every run writes the marks of all collected tests and how these went to ``build/families.json``; tests that it leaves
out because they are marked nightly have the outcome "nightly". The marks travel with the reports and with what workers
say at their end, so this works under pytest-xdist.
"""

import json
import os
from pathlib import Path

import pytest
from family_table import COVERAGE_PATH, check_features

LATENTS = ("method=xquant", "cache=latent")

_PROPERTY, _NIGHTLY = "covers", "nightly"
_OUTCOMES = ("failed", "skipped", "passed")


def covered_by(item: pytest.Item) -> list[list[str]]:
    """Pairs of family and feature that a test is marked with."""
    pairs = {(mark.args[0], feature) for mark in item.iter_markers("covers") for feature in mark.args[1:]}
    check_features(item.nodeid, [feature for _, feature in pairs])
    return sorted(map(list, pairs))


class FamilyCoverage:
    """Collects marks and outcomes; the controller of a run writes them."""

    def __init__(self, config: pytest.Config) -> None:
        self._writes = not hasattr(config, "workerinput")
        self._outcomes: dict[str, str] = {}
        self._marks: dict[str, list[list[str]]] = {}
        self._left_out: dict[str, list[list[str]]] = {}

    # First, so that the marks are checked of tests that -k and -m deselect, too.
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            pairs = covered_by(item)
            if pairs:
                item.user_properties.append((_PROPERTY, pairs))

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        nightly = (item for item in items if item.get_closest_marker(_NIGHTLY))
        self._left_out |= {item.nodeid: pairs for item in nightly if (pairs := covered_by(item))}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self._left_out |= getattr(node, "workeroutput", {}).get(_NIGHTLY, {})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        pairs = dict(report.user_properties).get(_PROPERTY)
        if not pairs or (report.when != "call" and report.passed):
            return
        worst = min(report.outcome, self._outcomes.get(report.nodeid, "passed"), key=_OUTCOMES.index)
        self._marks[report.nodeid], self._outcomes[report.nodeid] = pairs, worst

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self._writes:
            session.config.workeroutput[_NIGHTLY] = self._left_out
        if not self._writes or not self._marks:
            return
        outcomes = dict.fromkeys(self._left_out, _NIGHTLY) | self._outcomes
        marks = self._left_out | self._marks
        tests = {name: {"outcome": outcomes[name], "covers": marks[name]} for name in sorted(marks)}
        COVERAGE_PATH.parent.mkdir(exist_ok=True)
        unfinished = Path(f"{COVERAGE_PATH}.{os.getpid()}")
        unfinished.write_text(json.dumps(tests, indent=1))
        unfinished.replace(COVERAGE_PATH)
