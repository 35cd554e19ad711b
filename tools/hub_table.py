"""Make the support matrix of docs/families.md from what became of every family of the model hub, or check it.

Usage: python tools/hub_table.py [--write] [--found FOLDER]

``tests/model_hub/results.json`` says what became of each; `make families-all` writes it. With ``--found``, what a run
of tests/e2e/families/test_support_matrix.py has left in that folder is taken into it, and what has changed is printed.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS_PATH = ROOT / "tests" / "model_hub" / "results.json"
DOCUMENT_PATH = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- begin: written by tools/hub_table.py -->", "<!-- end: of the model hub -->"

SERVED, BROKEN, REFUSED = "served", "broken", "refused"
Families = dict[str, dict[str, Any]]


def render(results: dict[str, Any]) -> str:
    """The matrix, as Markdown.

    Args:
        results: ``vllm`` and ``transformers``, the versions that were tried, and ``families``: by name ``models``,
            ``architecture``, ``outcome``, ``why`` and ``change``.
    """
    families: Families = results["families"]
    count = {kind: sum(of["outcome"] == kind for of in families.values()) for kind in (SERVED, BROKEN, REFUSED)}
    lines = [
        f"Of {len(families)} families {count[SERVED]} are served, {count[REFUSED]} are refused, and of "
        f"{count[BROKEN]} the tiny checkpoint that was tried does not run on a CPU in vLLM {results['vllm']} "
        f"(transformers {results['transformers']}) itself, with its own 16-bit cache, or not as in transformers: these "
        "tell nothing about this cache.",
        "",
        "| family | for example | class | |",
        "|---|---|---|---|",
    ]
    for name, of in sorted(families.items(), key=lambda item: item[0].lower()):
        said = SERVED if of["outcome"] == SERVED else f"{_OUTCOMES[of['outcome']]}: {of['why']}"
        lines.append(_row([name, ", ".join(of["models"]), f"`{of['architecture']}`", said]))
    return "\n".join(lines)


_OUTCOMES = {BROKEN: "vLLM itself, as tried", REFUSED: "refused"}


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def replace_table(document: str, table: str) -> str:
    """The document with another matrix between its markers."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def take(results: dict[str, Any], known: Families, found: Iterable[dict[str, Any]]) -> list[str]:
    """Take what was found into the results; what is not among the known families goes.

    Args:
        results: changed in place.
        known: by name ``models`` and ``architecture``.
        found: ``family``, ``outcome``, ``why`` and ``change`` of some.

    Returns:
        What has changed, a line each.
    """
    new = {of["family"]: of for of in found}
    before: Families = results["families"]
    results["families"] = {
        name: {**of, **{key: new[name][key] for key in ("outcome", "why", "change")}} if name in new else before[name]
        for name, of in known.items()
        if name in new or name in before
    }
    after = results["families"]
    return [
        f"{name}: {before.get(name, {}).get('outcome', 'unknown')} -> {after.get(name, {}).get('outcome', 'gone')}"
        for name in sorted(before | after)
        if before.get(name, {}).get("outcome") != after.get(name, {}).get("outcome")
    ]


def _catalogue() -> Families:
    """Names and classes of all families that the tests know."""
    sys.path.insert(0, str(ROOT))
    from tests.model_hub.catalogue import FAMILIES

    return {of.name: {"models": list(of.models), "architecture": of.architecture} for of in FAMILIES}


def main() -> int:
    """Check the document, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the matrix instead of checking it")
    parser.add_argument("--found", type=Path, help="folder with what a run of all families has found")
    options = parser.parse_args()
    results = json.loads(RESULTS_PATH.read_text()) if RESULTS_PATH.exists() else {"families": {}}
    if options.found is not None:
        found = [json.loads(path.read_text()) for path in sorted(options.found.glob("*.json"))]
        for change in take(results, _catalogue(), found):
            print(change)
        results |= {name: version(name).partition("+")[0] for name in ("vllm", "transformers")}
        RESULTS_PATH.write_text(json.dumps(results, indent=1) + "\n")
    document = DOCUMENT_PATH.read_text()
    made = replace_table(document, render(results))
    if options.write:
        DOCUMENT_PATH.write_text(made)
        print(f"docs/families.md: the matrix is written from {len(results['families'])} families")
    elif made != document:
        print(
            "docs/families.md: not what tests/model_hub/results.json says; run `make families-write`", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
