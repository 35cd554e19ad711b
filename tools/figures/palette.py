"""Colors of the drawings, and what becomes of each where a page is dark."""

import re

PAPER = "#ffffff"
INK = "#1f2328"
FAINT = "#6b7280"
LINE = "#9ca3af"
GRID = "#e5e7eb"

# Colors of fillings with ink on them, and colors of lines and words on paper.
KEYS, VALUES, SCALES, SIXTEEN, INPUT = "#bfdbfe", "#bbf7d0", "#fde68a", "#e2e4e9", "#ddd6fe"
HOT, COLD = "#fecaca", "#cfe8ef"

# On a dark page. Its paper is that of the site's dark pages.
DARK = {
    PAPER: "#1e2129",
    INK: "#e6e9ef",
    FAINT: "#a3acba",
    LINE: "#7d8796",
    GRID: "#363b47",
    KEYS: "#1e4e8c",
    VALUES: "#1d6b3c",
    SCALES: "#7a5c0b",
    SIXTEEN: "#454b58",
    INPUT: "#5b3fa0",
    HOT: "#8f2f2f",
    COLD: "#2a5a6b",
    # Lines of plots (benchmarks/capacity_plot.py).
    "#c1121f": "#ff6b74",
    "#1d4ed8": "#7fa5ff",
    "#15803d": "#4cc577",
    "#0d9488": "#35c9bb",
    "#444444": "#bcc2cc",
    "#b45309": "#f0a04b",
    "#e39a3b": "#ffcf87",
    "#8b5cf6": "#b79bff",
}


def darkened(svg: str) -> str:
    """A drawing in the colors of dark pages.

    Args:
        svg: the text of the drawing, in the colors above.
    """
    return re.sub("#[0-9a-f]{6}", lambda color: DARK.get(color[0], color[0]), svg)
