"""Accuracy per byte: how far predictions move, against the bytes of a token (benchmarks/results/accuracy)."""

import json
from pathlib import Path
from typing import Any

from benchmarks.capacity_plot import LINES, RESULTS
from figures.canvas import SIZE, new_figure
from figures.palette import FAINT, GRID

MODEL = "smollm2-135m-instruct"
WIDTH, HEIGHT = 380, 470


def points(result: dict[str, Any], pattern: str, bits: tuple[int, ...]) -> list[tuple[float, float]]:
    """Bytes per token in percent of 16 bit, and the KL divergence, of the rows that a model has.

    Args:
        result: of a model, as benchmarks/results/accuracy has it.
        pattern: of the rows' names, with a place for their bits.
        bits: of the rows, one point each.
    """
    rows = {row["name"]: row for row in result["rows"]}
    chosen = [rows[name] for number in bits if (name := pattern.format(number)) in rows]
    return [(100 * row["bytes_per_token"] / row["bytes_per_token_16bit"], row["kl"]) for row in chosen]


def numbers(folder: Path = RESULTS) -> dict[str, list[tuple[float, float]]]:
    """The points of every line, by its label.

    Args:
        folder: of the result files.
    """
    result = json.loads((folder / f"{MODEL}.json").read_text())
    return {label: points(result, pattern, bits) for label, pattern, bits, *_ in LINES}


def draw(folder: Path = RESULTS) -> Any:
    """Draw it, as a figure of matplotlib.

    Args:
        folder: of the result files.
    """
    lines = numbers(folder)
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_axes((0.155, 0.42, 0.815, 0.52))
    for label, _, _, color, marker in LINES:
        own = label.startswith("xquant")
        x, y = zip(*lines[label], strict=True)
        style = {"linewidth": 2.2, "markersize": 6.5, "zorder": 3} if own else {"linewidth": 1.2, "markersize": 5}
        dashes = "--" if "not calibrated" in label else "-"
        axes.plot(x, y, dashes, color=color, marker=marker, label=label, clip_on=False, **style)
    for bits, (x, y) in zip(LINES[0][2], lines[LINES[0][0]], strict=True):
        axes.text(x, y * 0.72, f"{bits} bits", color=FAINT, fontsize=SIZE - 2, ha="center", va="top")
    axes.set_yscale("log")
    axes.set_ylim(0.0015, 2)
    axes.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    axes.set_xlim(12, 38)
    axes.set_xticks([15, 20, 25, 30, 35], ["15%", "20%", "25%", "30%", "35%"])
    axes.grid(color=GRID, linewidth=0.7)
    axes.minorticks_off()
    axes.set_axisbelow(True)
    axes.set_xlabel("bytes of a token, in percent of 16 bit")
    axes.set_title("KL divergence from 16 bit (lower is better)", fontsize=SIZE, loc="left", pad=10, x=-0.16)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.1, 0.0), frameon=False, fontsize=SIZE - 1.5)
    return figure
