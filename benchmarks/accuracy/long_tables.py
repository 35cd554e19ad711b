"""The tables of docs/long-texts.md, between their marks, and the plot beside them.

python benchmarks/accuracy/long_tables.py
"""

import json
import sys
from collections.abc import Iterable
from math import exp, log
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.generations import spread  # noqa: E402
from benchmarks.methods import METHODS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
PAGE = ROOT / "docs" / "long-texts.md"
PICTURE = ROOT / "docs" / "pictures" / "long-contexts.png"
_MARKS = {
    name: (f"<!-- {name}: made by benchmarks/accuracy/long_tables.py -->", f"<!-- end of {name} -->")
    for name in ("contexts", "generations")
}


def page(text: str) -> str:
    """The page with its tables made anew from the result files."""
    contexts = context_results()
    generations = [json.loads(path.read_text()) for path in sorted((RESULTS / "generations").glob("*.json"))]
    for name, lines in (("contexts", context_tables(contexts)), ("generations", generation_tables(generations))):
        begin, end = _MARKS[name]
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = "\n".join([f"{before}{begin}", "", *lines, f"{end}{after}"])
    return text


def context_results() -> list[dict[str, Any]]:
    """Of every model."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / "long-context").glob("*.json"))]


def context_tables(results: Iterable[dict[str, Any]]) -> Iterable[str]:
    """Divergence by position, and numbers found, a table for every model and length."""
    for result in results:
        for length in lengths_of(result):
            rows = [row for row in result["rows"] if str(length) in row["positions"]]
            table = rows[0]["positions"][str(length)]
            ranges = [f"{bucket['last']:,}" for bucket in table]
            yield f"**{result['model']}**, {length:,} tokens of {result['text']}: KL divergence of tokens up to"
            yield ""
            yield f"| cache | bytes per token | {' | '.join(ranges)} | all | increase in perplexity | found |"
            yield "|---|---|" + "---|" * (len(ranges) + 3)
            for row in sorted(rows, key=lambda row: -row["bytes_per_token"]):
                yield _context_row(row, length)
            if str(length) in result.get("repeated", {}):
                shares = [f"{share:.0%}" for share in result["repeated"][str(length)]]
                yield f"| *said before* |  | {' | '.join(shares)} |  |  |  |"
            yield ""
        yield from _copy_tables(result)


def lengths_of(result: dict[str, Any]) -> list[int]:
    """Tokens of the windows that any cache has read, the fewest first."""
    return sorted({int(length) for row in result["rows"] for length in row["positions"]})


def _context_row(row: dict[str, Any], length: int) -> str:
    table = row["positions"][str(length)]
    sizes = [bucket["last"] - bucket["first"] + 1 for bucket in table]
    kl = sum(size * bucket["kl"] for size, bucket in zip(sizes, table, strict=True)) / sum(sizes)
    increase = _perplexity(table, sizes, "perplexity") - _perplexity(table, sizes, "perplexity_16bit")
    cells = [f"{bucket['kl']:.4f}" for bucket in table]
    return (
        f"| {_bold(row['name'])} | {row['bytes_per_token']:,.0f} | {' | '.join(cells)} | {kl:.4f} | {increase:+.2f} | "
        f"{_found(row['needle'], length)} |"
    )


def _copy_tables(result: dict[str, Any]) -> Iterable[str]:
    rows = sorted((row for row in result["rows"] if row.get("copies")), key=lambda row: -row["bytes_per_token"])
    for length in sorted({entry["length"] for row in rows for entry in row["copies"]}):
        of_rows = {row["name"]: [entry for entry in row["copies"] if entry["length"] == length] for row in rows}
        of_rows = {name: entries for name, entries in of_rows.items() if entries}
        first = next(iter(of_rows.values()))
        yield (
            f"**{result['model']}**, passages that {length:,} tokens say twice: KL divergence (perplexity) of "
            f"{first[0]['tokens']} tokens that stood so many tokens before"
        )
        yield ""
        distances = [f"{entry['distance']:,}" for entry in first]
        plain = [f"({entry['perplexity_16bit']:.2f})" for entry in first]
        yield f"| cache | {' | '.join(distances)} |"
        yield "|---|" + "---|" * len(first)
        yield f"| 16 bit | {' | '.join(plain)} |"
        for name, entries in of_rows.items():
            cells = [f"{entry['kl']:.4f} ({entry['perplexity']:.2f})" for entry in entries]
            yield f"| {_bold(name)} | {' | '.join(cells)} |"
        yield ""


def _bold(name: str) -> str:
    return f"**{name}**" if name.startswith("xquant") else name


def _perplexity(table: list[dict[str, Any]], sizes: list[int], name: str) -> float:
    total = sum(size * log(bucket[name]) for size, bucket in zip(sizes, table, strict=True))
    return exp(total / sum(sizes))


def _found(needle: dict[str, Any] | None, length: int) -> str:
    cells = [cell for cell in needle["cells"] if cell["length"] == length] if needle else []
    if not cells:
        return ""
    found, of_16bit = (
        round(sum(cell["prompts"] * cell[name] for cell in cells)) for name in ("accuracy", "accuracy_16bit")
    )
    return f"{found} of {sum(cell['prompts'] for cell in cells)} (16 bit: {of_16bit})"


def generation_tables(results: Iterable[dict[str, Any]]) -> Iterable[str]:
    """What the 16-bit model says of generated texts, a table for every result."""
    for result in results:
        drawn = (
            "the most likely token each time"
            if result["temperature"] == 0
            else (f"drawn at temperature {result['temperature']:g}")
        )
        yield (
            f"**{result['model']}**, {result['dtype']}, {result['prompts']} prompts of "
            f"{result['prompt_tokens']} tokens ({result['text']}), up to {result['tokens']:,} tokens each, {drawn}:"
        )
        yield ""
        parts = len(result["rows"][0]["difference_parts"])
        heads = [f"quarter {part}" for part in range(1, parts + 1)]
        yield f"| cache | nats per token | difference to 16 bit | {' | '.join(heads)} | repeated | tokens | same for |"
        yield "|---|---|---|" + "---|" * (parts + 3)
        for row in result["rows"]:
            cells = [spread(part) if part["texts"] else "" for part in row["difference_parts"]]
            yield (
                f"| {METHODS[row['method']].label} | {row['nll']['mean']:.3f} | {spread(row['difference']['nll'])} | "
                f"{' | '.join(cells)} | {row['repetition']['mean']:.1%} | {row['length']['mean']:,.0f} | "
                f"{row['same_tokens']:,.0f} |"
            )
        yield ""


if __name__ == "__main__":
    from benchmarks.accuracy.long_plot import plot

    PAGE.write_text(page(PAGE.read_text()))
    plot(context_results(), PICTURE)
