"""The plot of docs/accuracy.md: tokens in the same memory against the increase in perplexity and the divergence."""

from pathlib import Path
from typing import Any

from benchmarks.accuracy.table import everything

# A family is what a row's name starts with, longest first.
FAMILIES = {
    "KIVI*": ("tab:orange", "v"),
    "KIVI": ("tab:brown", "^"),
    "TurboQuant": ("tab:purple", "D"),
    "XQuant-CL, as printed": ("tab:gray", "s"),
    "XQuant, as printed": ("black", "s"),
    "xquant, data-free": ("tab:olive", "x"),
    "xquant, data-free joint": ("tab:cyan", "x"),
    "xquant-cl, data-free": ("tab:pink", "x"),
    "xquant, per head": ("tab:green", "o"),
    "xquant, joint": ("tab:blue", "o"),
    "xquant-cl": ("tab:red", "o"),
}


def plot(results: list[dict], path: Path) -> None:
    """Draw a row for every model on which the caches of the paper were measured, too.

    Args:
        results: of every model, as benchmarks/results/accuracy has them.
        path: of the PNG file.
    """
    import matplotlib

    results = [result for result in results if everything(result)]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = (("increase", "increase in perplexity"), ("kl", "KL divergence (nats)"))
    figure, axes = pyplot.subplots(len(results), 2, figsize=(11, 3.7 * len(results) + 1), squeeze=False)
    for row, result in zip(axes, results, strict=True):
        for panel, (measure, label) in zip(row, measures, strict=True):
            _draw(panel, result, measure)
            panel.set_title(f"{result['model']}: {label}", fontsize=10)
    for panel in axes[-1]:
        panel.set_xlabel("tokens in the same memory, times 16 bit")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 1 / (3.7 * len(results) + 1), 1, 1))
    figure.savefig(path, dpi=110)


def _draw(axes: Any, result: dict, measure: str) -> None:
    for family, (color, marker) in FAMILIES.items():
        rows = sorted((row for row in result["rows"] if _family(row["name"]) == family), key=_times)
        # On a logarithmic axis what is lost in noise, or gained by it, stands at its lower end.
        points = [(_times(row), max(row[measure], 1e-3)) for row in rows]
        axes.plot(*zip(*points, strict=True) if points else ([], []), color=color, marker=marker, label=family)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _family(name: str) -> str:
    return max((family for family in FAMILIES if name.startswith(family)), key=len)


def _times(row: dict) -> float:
    return row["bytes_per_token_16bit"] / row["bytes_per_token"]
