"""Make the table of model families in docs/families.md from what the tests covered, or check that it is up to date.

Usage: python tools/family_table.py [--write]

Reads ``build/families.json``, which every run of the tests writes (tests/family_coverage.py says how tests are marked).
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COVERAGE_PATH = ROOT / "build" / "families.json"
DOCUMENT_PATH = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- begin: written by tools/family_table.py -->", "<!-- end -->"

# Columns of the table: a feature, or a feature with the values it may have.
FEATURES: dict[str, tuple[str, ...]] = {
    "method": ("xquant", "xquant-cl"),
    "cache": ("latent", "x"),
    "bits": ("8", "4", "3", "2"),
    "rope": ("default", "partial", "linear", "dynamic", "llama3", "yarn", "longrope", "multimodal", "none"),
    "bias": (),
    "qk-norm": (),
    "sliding window": (),
    "attention sinks": (),
    "states beside it": (),
    "mixed with 16 bit": (),
    "prefix caching": (),
    "chunked prefill": (),
    "preemption": (),
    "torch.compile": (),
    "tensor parallel": (),
}
REFUSED = "refused"

Coverage = dict[str, set[str]]


def check_features(where: str, features: Iterable[str]) -> None:
    """Refuse features that the table has no column for.

    Raises:
        ValueError: a feature is unknown.
    """
    known = {REFUSED} | {name for name, values in FEATURES.items() if not values}
    known |= {f"{name}={value}" for name, values in FEATURES.items() for value in values}
    unknown = sorted(set(features) - known)
    if unknown:
        raise ValueError(
            f"{where} is marked to cover {unknown[0]!r}, which tools/family_table.py has no column for; known are "
            f"{', '.join(sorted(known))}"
        )


def merge(pairs: Iterable[Iterable[str]]) -> Coverage:
    """Features by family, of pairs of family and feature."""
    coverage: Coverage = defaultdict(set)
    for family, feature in pairs:
        coverage[family].add(feature)
    return coverage


def render(coverage: Coverage) -> str:
    """The tables, as Markdown."""
    served = sorted((name for name in coverage if coverage[name] != {REFUSED}), key=str.lower)
    lines = [_row(["family", *FEATURES]), "|---" * (len(FEATURES) + 1) + "|"]
    lines += [_row([name, *(_cell(coverage[name], *column) for column in FEATURES.items())]) for name in served]
    refused = sorted((name for name in coverage if coverage[name] == {REFUSED}), key=str.lower)
    lines += ["", "Refused by name at start-up:", "", *(f"* {name}" for name in refused)]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(covered: set[str], name: str, values: tuple[str, ...]) -> str:
    if not values:
        return "yes" if name in covered else ""
    return ", ".join(value for value in values if f"{name}={value}" in covered)


def replace_table(document: str, table: str) -> str:
    """The document with another table between its markers."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> int:
    """Check the document, or write it."""
    parser = argparse.ArgumentParser(description="Check docs/families.md against the last run of the tests.")
    parser.add_argument("--write", action="store_true", help="write the table instead of checking it")
    write = parser.parse_args().write
    if not COVERAGE_PATH.is_file():
        return _fail("no test has run yet that covers a family; run `make test` first")
    tests = json.loads(COVERAGE_PATH.read_text())
    bad = sorted(name for name, test in tests.items() if test["outcome"] == "failed")
    skipped = sorted(name for name, test in tests.items() if test["outcome"] == "skipped")
    if bad or (skipped and write):
        return _fail(f"{(bad + skipped)[0]} did not pass, so the table cannot tell what works; make it pass first")
    document = DOCUMENT_PATH.read_text()
    # What is skipped on this machine may pass on another one: not a reason to call the table wrong.
    made = replace_table(document, render(merge(pair for test in tests.values() for pair in test["covers"])))
    if write:
        DOCUMENT_PATH.write_text(made)
        print(f"{DOCUMENT_PATH.relative_to(ROOT)}: written from {len(tests)} tests")
        return 0
    if made != document:
        return _fail(
            "it differs from what the tests covered; run `make test`, then `make families-write`, and commit it"
        )
    nightly = sum(test["outcome"] == "nightly" for test in tests.values())
    print(
        f"{DOCUMENT_PATH.relative_to(ROOT)}: as {len(tests)} tests cover it, {len(skipped)} of them skipped here and "
        f"{nightly} left to `make test-nightly`"
    )
    return 0


def _fail(why: str) -> int:
    print(f"{DOCUMENT_PATH.relative_to(ROOT)}: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
