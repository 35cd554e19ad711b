"""The tables of docs/benchmarks.md, made from result files: no figure is typed by hand.

    python benchmarks/results_page.py --write

A table stands between ``<!-- table: FILE -->``, the file below benchmarks/results, and ``<!-- end of table -->``. FILE
may also be ``processors``: the default method on all processors of which there are results.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.cpu import processors  # noqa: E402
from benchmarks.files import read_json  # noqa: E402
from benchmarks.methods import METHODS  # noqa: E402
from benchmarks.serving import report  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def page(text: str, results: Path) -> str:
    """The page with all its tables made anew."""

    def fresh(found: re.Match[str]) -> str:
        if found.group(2) == "processors":
            return f"{found.group(1)}\n{processors.table(results)}\n{found.group(3)}"
        if not (results / found.group(2)).exists():
            return f"{found.group(1)}\nNot measured yet.\n{found.group(3)}"
        result = read_json(results / found.group(2))
        return f"{found.group(1)}\n{table(result)}\n\n{_source(result, found.group(2))}\n{found.group(3)}"

    return _TABLE.sub(fresh, text)


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    kind = result["benchmark"]
    if kind == "serving":
        return report.hits_table(result) if result["trace"]["name"] == "file" else report.table(result)
    return {"offline": _offline, "prefix hit": _prefix_hit}.get(kind, _operation)(result)


def _offline(result: dict[str, Any]) -> str:
    whats = [what for what in ("decode", "prefill") if f"{what}_ratio" in result["rows"][0]]
    head = ["context", "cache", *(f"{what} tokens/s | {what}, times 16 bit" for what in whats)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * (2 + 2 * len(whats))]
    for row in result["rows"]:
        cells = [str(row["context"]), METHODS[row["method"]].label]
        for what in whats:
            if f"{what}_ratio" not in row:
                cells += ["", ""]
                continue
            cells += [f"{row[f'{what}_tokens_per_second']['median']:.1f}", _spread(row[f"{what}_ratio"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _prefix_hit(result: dict[str, Any]) -> str:
    tokens = f"{result['prefix']} + {result['question']} tokens"
    lines = [
        f"| cache | first token of {tokens}, ms | share of 16 bit | tokens promoted | pool | cache tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        time, what = row["milliseconds"], "prefix hit" if row["cached"] else "prefilled"
        lines.append(
            f"| {METHODS[row['method']].label}, {what} | {time['median']:.0f} "
            f"({time['low']:.0f}-{time['high']:.0f}) | {_spread(row['ratio'])} | {row['promoted_tokens']:.0f} | "
            f"{row['pool_tokens']:,.0f} | {result['cache_tokens'][row['method']]:,} |"
        )
    return "\n".join(lines)


def _operation(result: dict[str, Any]) -> str:
    lines = [
        "| layer | shape | cache | microseconds | times CPU_ATTN BF16 | of the roof |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        time = row["microseconds"]
        lines.append(
            f"| {row['model']} | {row['shape']} | {row['variant']} | {time['median']:.0f} "
            f"({time['low']:.0f}-{time['high']:.0f}) | {_spread(row['speed_of_baseline'])} | "
            f"{row['roof']:.0%}, {row['binding']} |"
        )
    return "\n".join(lines)


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _source(result: dict[str, Any], file: str) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"From `benchmarks/results/{file}`: {_processor(machine)}, {machine['threads']} threads "
        f"({machine['instruction_set']}), {versions}, commit {machine['commit']}, {machine['date']}."
    )


def _processor(machine: dict[str, Any]) -> str:
    about = processors.about(machine)
    return f"{machine['processor']} ({about})" if about else machine["processor"]


def main() -> int:
    """Write the page, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the page (default: only compare)")
    options = parser.parse_args()
    text = PAGE.read_text()
    new = page(text, RESULTS)
    if options.write:
        PAGE.write_text(new)
    elif new != text:
        print(f"{PAGE} is not what the results say: run benchmarks/results_page.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
