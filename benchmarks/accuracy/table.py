"""The tables of docs/accuracy.md, between their marks."""

import statistics
from pathlib import Path

BEGIN, END = "<!-- table: made by benchmarks/compare_accuracy.py --write -->", "<!-- end of table -->"

# Rows of the summary: what names start with, as a table says it.
SUMMARY = {
    "XQuant, as printed": "XQuant as printed",
    "KIVI*": "KIVI*",
    "TurboQuant": "TurboQuant",
    "xquant, data-free": "xquant, data-free",
    "xquant, per head": "xquant, per head",
    "xquant, joint": "xquant, joint",
}
_DTYPES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
_WITHOUT_COMMA = ("KIVI*", "TurboQuant")


def write_table(results: list[dict], path: Path) -> None:
    """Replace what is between the marks.

    Args:
        results: of every model, as benchmarks/results/accuracy has them.
        path: of the page.
    """
    path.write_text(page(path.read_text(), results))


def page(text: str, results: list[dict]) -> str:
    """The page with its tables made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{summary(results)}\n{table(results)}\n{END}{after}"


def summary(results: list[dict]) -> str:
    """Mean increase over the models with grouped queries, whose rows have about the same bytes, as Markdown."""
    wanted = {
        start: [f"{start}{'' if start in _WITHOUT_COMMA else ','} {bits}" for bits in (4, 3, 2)] for start in SUMMARY
    }
    # Multi-head attention has no rows per head, and of some models there is a choice of rows.
    models = [
        rows for rows in map(_by_name, results) if all(name in rows for names in wanted.values() for name in names)
    ]
    lines = [
        f"Mean increase in perplexity over the {len(models)} models with grouped queries:",
        "",
        "| cache | 4 bits | 3 bits | 2 bits |",
        "|---|---|---|---|",
    ]
    for start, label in SUMMARY.items():
        increases = [statistics.mean(rows[name]["increase"] for rows in models) for name in wanted[start]]
        lines.append(f"| {label} | {' | '.join(map(_number, increases))} |")
    return "\n".join([*lines, ""])


def table(results: list[dict]) -> str:
    """Rows of every model by bytes, as Markdown."""
    lines = []
    for result in results:
        rows = sorted(result["rows"], key=lambda row: (-row["bytes_per_token"], row["kl"]))
        plain = rows[0]["bytes_per_token_16bit"]
        texts = rows[0]["texts"]
        perplexities = " and ".join(f"{text['perplexity_16bit']:.2f} on {text['text']}" for text in texts)
        windows = "one window" if result["windows"] == 1 else f"{result['windows']} windows"
        lines += [
            f"**{result['model']}**, {_DTYPES[texts[0]['dtype']]}, {windows} of {result['window']:,} tokens per text. "
            f"16 bit takes {plain:,} bytes per token; its perplexity is {perplexities}.",
            "",
            "| cache | bytes per token | tokens, times 16 bit | increase in perplexity | KL divergence | "
            "top-1 agreement |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            ours = row["name"].startswith("xquant")
            name = f"**{row['name']}**" if ours else row["name"]
            size = row["bytes_per_token"]
            lines.append(
                f"| {name} | {size:,.0f} | {plain / size:.2f} | {_number(row['increase'])} | {row['kl']:.4f} | "
                f"{row['top1_agreement']:.1%} |"
            )
        lines.append("")
    return "\n".join(lines)


def everything(result: dict) -> bool:
    """Whether all caches were measured on a model, those of the paper, too, and not a choice of them."""
    return "XQuant, as printed, 4" in _by_name(result)


def _by_name(result: dict) -> dict[str, dict]:
    return {row["name"]: row for row in result["rows"]}


def _number(increase: float) -> str:
    return f"{increase:+.2f}" if abs(increase) < 100 else f"{increase:+,.0f}"
