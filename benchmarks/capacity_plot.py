"""The picture of README.md: what a cache holds in the same memory, against what it loses.

    python benchmarks/capacity_plot.py

Every point is a row of benchmarks/results/accuracy: nothing is measured here and no figure is typed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
PICTURE = ROOT / "docs" / "pictures" / "capacity.png"

# Result files, and how their panels are headed. Both models have grouped-query attention as they were trained.
MODELS = {"smollm2-135m-instruct": "SmolLM2-135M", "gemma-3-270m": "Gemma 3 270M"}

# How lines are drawn: label, names of the rows, their bits, color, marker. KIVI's published
# setting keeps the last 128 tokens in 16 bit.
LINES = (
    ("xquant-cl, calibrated", "xquant-cl, {}", (4, 3, 2), "#c1121f", "o"),
    ("xquant, joint, calibrated", "xquant, joint, {}", (4, 3, 2), "#1d4ed8", "o"),
    ("xquant, per head, calibrated", "xquant, per head, {}", (4, 3, 2), "#15803d", "o"),
    ("xquant, not calibrated (default)", "xquant, data-free, {}", (4, 3, 2), "#0d9488", "X"),
    ("XQuant as the paper prints it", "XQuant, as printed, {}", (4, 3, 2), "#444444", "s"),
    ("KIVI, last 128 tokens in 16 bit", "KIVI {}, residual 128", (4, 2), "#b45309", "^"),
    ("KIVI*, keys before RoPE", "KIVI* {}", (4, 3, 2), "#e39a3b", "v"),
    ("TurboQuant", "TurboQuant {}", (4, 3, 2), "#8b5cf6", "D"),
)
# Below it an increase is luck (docs/evaluation.md), and below the axis' lower end points stand on it.
NOISE, LEAST, MOST = 0.1, 0.02, 400.0


def points(result: dict[str, Any], pattern: str, bits: tuple[int, ...]) -> list[tuple[float, float]]:
    """Times the tokens of 16 bit, and the increase in perplexity, of the rows that a model has.

    Args:
        result: of a model, as benchmarks/results/accuracy has it.
        pattern: of the rows' names, with a place for their bits.
        bits: of the rows, one point each.
    """
    rows = {row["name"]: row for row in result["rows"]}
    chosen = [rows[name] for number in bits if (name := pattern.format(number)) in rows]
    return [(row["bytes_per_token_16bit"] / row["bytes_per_token"], row["increase"]) for row in chosen]


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a panel for every model.

    Args:
        results: by the model's name, as benchmarks/results/accuracy has them.
        path: of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans", "axes.spines.top": False})
    pyplot.rcParams.update({"axes.spines.right": False, "axes.edgecolor": "#666666"})
    figure, axes = pyplot.subplots(1, len(results), figsize=(8.4, 4.9), sharey=True)
    for panel, (name, result) in zip(axes, results.items(), strict=True):
        _panel(panel, result)
        panel.set_title(MODELS[name], fontsize=11, fontweight="bold", pad=22)
        panel.set_xlabel("tokens in the same memory, times 16 bit")
    axes[0].set_ylabel("increase in perplexity")
    axes[0].text(7.95, 0.045, "too little to tell", color="#777777", fontsize=9, ha="right")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9, columnspacing=1.4)
    figure.subplots_adjust(left=0.085, right=0.985, top=0.88, bottom=0.265, wspace=0.07)
    figure.savefig(path, dpi=200, metadata={"Software": None})
    pyplot.close(figure)


def _panel(panel: Any, result: dict[str, Any]) -> None:
    panel.axhspan(LEAST / 2, NOISE, color="#eeeeee", zorder=0)
    for label, pattern, bits, color, marker in LINES:
        own = label.startswith("xquant")
        dashes = "--" if "not calibrated" in label else "-"
        line = [(times, max(increase, LEAST)) for times, increase in points(result, pattern, bits)]
        style = {"linewidth": 2.2, "markersize": 6, "zorder": 3} if own else {"linewidth": 1.3, "markersize": 5}
        x, y = zip(*line, strict=True) if line else ((), ())
        panel.plot(x, y, dashes, color=color, marker=marker, label=label, clip_on=False, **style)
    for bits, (times, _) in zip(LINES[1][2], points(result, *LINES[1][1:3]), strict=True):
        panel.text(times, MOST * 1.15, f"{bits} bits", color="#777777", fontsize=9, ha="center", va="bottom")
    panel.set_yscale("log")
    panel.set_ylim(LEAST, MOST)
    panel.set_xlim(2.5, 8)
    panel.set_yticks([0.1, 1, 10, 100], ["+0.1", "+1", "+10", "+100"])
    panel.set_xticks(range(3, 9), [f"{times}x" for times in range(3, 9)])
    panel.grid(axis="both", color="#dddddd", linewidth=0.6)
    panel.minorticks_off()
    panel.set_axisbelow(True)


def main() -> int:
    """Make the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="FILE.png")
    options = parser.parse_args()
    draw({name: json.loads((RESULTS / f"{name}.json").read_text()) for name in MODELS}, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
