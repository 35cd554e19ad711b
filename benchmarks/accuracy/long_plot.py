"""The plot of docs/long-texts.md: the divergence by position in the window, of every model and cache."""

from pathlib import Path
from typing import Any

from benchmarks.accuracy.long_tables import lengths_of
from benchmarks.accuracy.plot import FAMILIES

# What a name ends with: bits, or bits and the residual.
_LINES = {"4": "-", "3": "--", "2": ":"}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel for every model, of its longest windows.

    Args:
        results: of every model, as benchmarks/results/accuracy/long-context has them.
        path: of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4.6 * len(results), 4.6), sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for panel, result in zip(axes[0], results, strict=True):
        length = str(lengths_of(result)[-1])
        for row in sorted(result["rows"], key=lambda row: row["name"]):
            if length in row["positions"]:
                handles.setdefault(row["name"], _draw(panel, row["name"], row["positions"][length]))
        panel.set_yscale("log")
        panel.set_ylim(bottom=1e-3)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        panel.set_title(result["model"], fontsize=10)
        panel.set_xlabel("position in the window (tokens)")
    axes[0][0].set_ylabel("KL divergence (nats)")
    names = sorted(handles)
    figure.legend([handles[name] for name in names], names, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06 + 0.04 * ((len(names) + 3) // 4), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(panel: Any, name: str, table: list[dict[str, Any]]) -> Any:
    family, _, bits = name.partition(", residual")[0].rpartition(" ")
    color, marker = FAMILIES[family.rstrip(",")]
    middles = [(bucket["first"] + bucket["last"]) / 2 for bucket in table]
    values = [bucket["kl"] for bucket in table]
    (line,) = panel.plot(middles, values, color=color, marker=marker, markersize=4, linestyle=_LINES[bits])
    return line
