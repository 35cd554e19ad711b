"""A canvas in points on which the drawings put boxes, arrows and words, and how it becomes an SVG file."""

import re
from pathlib import Path
from typing import Any

from figures.palette import FAINT, INK, LINE, PAPER

SIZE = 11.5  # of words, in points; a drawing as wide as a phone is shown at about its own size


class Canvas:
    """A drawing of a width and a height in points, with its origin at the upper left."""

    def __init__(self, width: float, height: float) -> None:
        """Make an empty one."""
        self.figure = new_figure(width, height)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, fill: str, **style: Any) -> None:
        """A box with round corners; ``edge`` is the color of its outline, ``dashed`` how that is drawn."""
        from matplotlib.patches import FancyBboxPatch

        rounding = style.get("rounding", 4)
        shape = f"round,pad=0,rounding_size={min(rounding, height / 2, width / 2)}"
        lines = {"linewidth": style.get("line", 1.0), "linestyle": "--" if style.get("dashed") else "-"}
        edge = style.get("edge", LINE)
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=fill, edgecolor=edge, **lines)
        )

    def words(self, x: float, y: float, text: str, **style: Any) -> None:
        """Words around a point: ``size``, ``color``, ``bold``, ``align`` as matplotlib has them."""
        self.axes.text(
            x,
            y,
            text,
            fontsize=style.get("size", SIZE),
            color=style.get("color", INK),
            ha=style.get("align", "center"),
            va=style.get("upright", "center"),
            fontweight="bold" if style.get("bold") else "normal",
            linespacing=1.3,
        )

    def labelled(self, x: float, y: float, width: float, height: float, fill: str, text: str, small: str = "") -> None:
        """A box with words in it, and smaller ones below them."""
        self.box(x, y, width, height, fill)
        middle = y + height / 2
        if small:
            lines = small.count("\n") + 1
            self.words(x + width / 2, middle - 5 - 4 * (lines - 1), text)
            self.words(x + width / 2, middle + 9 + 1.5 * (lines - 1), small, size=SIZE - 2.5, color=INK)
        else:
            self.words(x + width / 2, middle, text)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], text: str = "", **style: Any) -> None:
        """An arrow, with words to the right of its middle."""
        color = style.get("color", FAINT)
        self.axes.annotate(
            "",
            xy=end,
            xytext=start,
            arrowprops={
                "arrowstyle": "-|>,head_width=0.25,head_length=0.45",
                "color": color,
                "linewidth": 1.3,
                "shrinkA": 0,
                "shrinkB": 0,
                "connectionstyle": style.get("path", "arc3"),
            },
        )
        if text:
            x, y = (start[0] + end[0]) / 2 + 7, (start[1] + end[1]) / 2
            self.words(x, y, text, align="left", size=SIZE - 2, color=FAINT)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in points, in the style of all drawings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcdefaults()
    pyplot.rcParams.update(
        {"font.size": SIZE, "font.family": "DejaVu Sans", "svg.hashsalt": "xquant", "svg.fonttype": "path"}
    )
    pyplot.rcParams.update({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    pyplot.rcParams.update({"axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot.figure(figsize=(width / 72, height / 72), facecolor=PAPER)


def save(figure: Any, path: Path, numbers: str = "") -> None:
    """Write a figure as SVG, the same bytes for the same drawing by the same matplotlib.

    Args:
        figure: of matplotlib; it is closed.
        path: of the file.
        numbers: what it was drawn from, kept in the file: a test compares it with the results.
    """
    from matplotlib import pyplot

    metadata = {"Date": None, "Creator": None, "Description": numbers or None}
    figure.savefig(path, format="svg", facecolor=PAPER, metadata=metadata)
    pyplot.close(figure)
    # matplotlib leaves spaces at the ends of lines.
    path.write_text(re.sub(r"[ \t]+$", "", path.read_text(), flags=re.M))
