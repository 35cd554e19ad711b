"""Table and plot of a serving benchmark."""

from pathlib import Path
from typing import Any

from benchmarks.cpu.timing import Spread
from benchmarks.methods import BASELINE, METHODS

# Key of a run's result, what the table calls it, its format.
COLUMNS = (
    ("request_throughput", "requests/s", ".2f"),
    ("total_token_throughput", "tokens/s", ".1f"),
    ("output_throughput", "output tokens/s", ".1f"),
    ("mean_ttft_ms", "TTFT ms", ".0f"),
    ("p99_ttft_ms", "p99", ".0f"),
    ("mean_tpot_ms", "TPOT ms", ".1f"),
    ("p99_tpot_ms", "p99", ".1f"),
    ("mean_itl_ms", "ITL ms", ".1f"),
    ("p99_itl_ms", "p99", ".1f"),
    ("peak_running", "peak running", ".0f"),
    ("peak_waiting", "peak waiting", ".0f"),
    ("preemptions", "preemptions", ".0f"),
    ("prefix_hit_rate", "prefix hits", ".0%"),
)
# Only of a load that `xquant plan` can foretell.
PLANNED = ("planned_hit_rate", "planned", ".1%")


def summarize(runs: dict[str, list[dict[str, Any]]], cache_tokens: dict[str, int]) -> list[dict[str, Any]]:
    """One row per method: the spread of every number over the repeats, and of the throughput's ratio to 16 bit in the
    same repeat.
    """
    rows = []
    for name, of_method in runs.items():
        numbers = [key for key, value in of_method[0].items() if isinstance(value, int | float)]
        row: dict[str, Any] = {"method": name, "label": METHODS[name].label, "cache_tokens": cache_tokens[name]}
        row["numbers"] = {key: Spread.of([run[key] for run in of_method]).scaled(1) for key in numbers}
        if BASELINE in runs:
            pairs = zip(of_method, runs[BASELINE], strict=True)
            key = "total_token_throughput"
            row["throughput_ratio"] = Spread.of([ours[key] / plain[key] for ours, plain in pairs]).scaled(1)
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    columns = COLUMNS
    if any(PLANNED[0] in row["numbers"] for row in result["rows"]):
        columns = (*COLUMNS[:-1], ("prefix_hit_rate", "prefix hits", ".1%"), PLANNED)
    head = ["cache", "cache tokens", *(title for _, title, _ in columns), "throughput of 16 bit"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        cells = [row["label"], f"{row['cache_tokens']:,}"]
        cells += [format(row["numbers"][key]["median"], form) for key, _, form in columns]
        ratio = row.get("throughput_ratio")
        spread = f" ({ratio['least']:.2f}-{ratio['most']:.2f})" if ratio else ""
        cells.append(f"{ratio['median']:.2f}x{spread}" if ratio else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nNot here: {METHODS[name].label}: {why}" for name, why in result["absent"].items()]
    return "\n".join(lines)


def hits_table(result: dict[str, Any]) -> str:
    """What was found of a trace's file, as Markdown; how fast depends on how its times were scaled."""
    head = ("cache", "cache tokens", "prefix hits", "planned", "preemptions", "peak running", "peak waiting")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        numbers = {key: spread["median"] for key, spread in row["numbers"].items()}
        cells = [row["label"], f"{row['cache_tokens']:,}"]
        cells += [f"{numbers['prefix_hit_rate']:.3f}", f"{numbers['planned_hit_rate']:.3f}"]
        cells += [f"{numbers[key]:.0f}" for key in ("preemptions", "peak_running", "peak_waiting")]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| endless | | | {result['trace']['endless_hit_rate']:.3f} | | | |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Throughput and time to the first token of every method, with the range of the repeats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    labels = [f"{row['label']}\n{row['cache_tokens']:,} tokens" for row in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.6 * len(rows) + 2.2), sharey=True)
    panels = (("total_token_throughput", "tokens per second"), ("mean_ttft_ms", "time to first token, ms"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        numbers = [row["numbers"][key] for row in rows]
        medians = [number["median"] for number in numbers]
        below = [number["median"] - number["least"] for number in numbers]
        above = [number["most"] - number["median"] for number in numbers]
        colors = ["#2b6cb0" if row["method"].startswith("xquant") else "#a0aec0" for row in rows]
        axis.barh(labels, medians, xerr=[below, above], color=colors, error_kw={"capsize": 3, "lw": 1})
        for index, value in enumerate(medians):
            axis.annotate(f" {value:,.0f}", (value, index), va="bottom", fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, 1.15 * max(number["most"] for number in numbers))
    axes[0].invert_yaxis()
    trace = result["trace"]
    load = f"load '{trace['name']}', {trace['requests']} requests"
    figure.suptitle(f"{result['model']}, {load}, {result['cache_mib']} MiB of cache each", fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
