"""The table of docs/accuracy.md, between its marks."""

from pathlib import Path

BEGIN, END = "<!-- table: made by benchmarks/compare_accuracy.py --write -->", "<!-- end of table -->"


def write_table(results: list[dict], path: Path) -> None:
    """Replace what is between the marks.

    Args:
        results: of every model, as benchmarks/results/accuracy has them.
        path: of the page.
    """
    text = path.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n\n{table(results)}\n{END}{after}")


def table(results: list[dict]) -> str:
    """Rows of every model by bytes, as Markdown."""
    lines = []
    for result in results:
        rows = sorted(result["rows"], key=lambda row: (-row["bytes_per_token"], row["kl"]))
        plain = rows[0]["bytes_per_token_16bit"]
        perplexities = ", ".join(f"{text['text']} {text['perplexity_16bit']:.2f}" for text in rows[0]["texts"])
        lines += [
            f"**{result['model']}**: 16 bit takes {plain:,} bytes per token; its perplexities: {perplexities}.",
            "",
            "| cache | bytes per token | of 16 bit | increase in perplexity | KL divergence | top-1 agreement |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            ours = row["name"].startswith("xquant")
            name = f"**{row['name']}**" if ours else row["name"]
            size = row["bytes_per_token"]
            lines.append(
                f"| {name} | {size:,.0f} | {size / plain:.3f} | {_number(row['increase'])} | {row['kl']:.4f} | "
                f"{row['top1_agreement']:.1%} |"
            )
        lines.append("")
    return "\n".join(lines)


def _number(increase: float) -> str:
    return f"{increase:+.2f}" if abs(increase) < 100 else f"{increase:+,.0f}"
