"""A page to scale beside one of a 16-bit cache, and its sections with their first bytes (codec/layout.py)."""

from figures.canvas import SIZE, Canvas
from figures.model import BLOCK_SIZE, PAGE, SIXTEEN_BIT_BYTES, sections
from figures.palette import COLD, FAINT, HOT, KEYS, LINE, SCALES, SIXTEEN, VALUES

WIDTH, HEIGHT = 380, 500
_TOP, _TALL = 58, 432


def draw() -> Canvas:
    """Draw it."""
    canvas = Canvas(WIDTH, HEIGHT)
    sixteen = BLOCK_SIZE * SIXTEEN_BIT_BYTES
    short = _TALL * PAGE.page_bytes / sixteen
    canvas.words(WIDTH / 2, 13, f"A page of {BLOCK_SIZE} tokens of one layer", bold=True)
    canvas.words(38, 38, "16 bit", size=SIZE - 1)
    canvas.box(12, _TOP, 52, _TALL, SIXTEEN, rounding=2)
    canvas.words(38, _TOP + _TALL / 2, f"{sixteen:,}\nbytes", size=SIZE - 1)
    canvas.words(98, 38, "xquant", size=SIZE - 1)
    canvas.box(72, _TOP, 52, short, COLD, rounding=2)
    canvas.words(98, _TOP + short / 2, f"{PAGE.page_bytes:,}\nbytes", size=SIZE - 1)
    for start, end in (((124, _TOP), (150, _TOP)), ((124, _TOP + short), (150, _TOP + _TALL))):
        canvas.axes.plot([start[0], end[0]], [start[1], end[1]], color=LINE, linewidth=1, linestyle=":")
    canvas.words(150, 38, "the same, enlarged: first byte, section", size=SIZE - 1.5, align="left", color=FAINT)
    y = float(_TOP)
    for name, first, size in sections():
        height = _TALL * size / PAGE.page_bytes
        canvas.box(150, y, 54, height, _fill(name), rounding=0)
        canvas.words(200, y + min(height / 2, 12), f"{first:,}", size=SIZE - 2.5, align="right")
        canvas.words(211, y + min(height / 2, 12), name, size=SIZE - 1 if height > 40 else SIZE - 2, align="left")
        if height > 40:
            text = f"{size:,} bytes: {size // BLOCK_SIZE} per token"
            canvas.words(211, y + 28, text, size=SIZE - 2.5, align="left", color=FAINT)
        y += height
    return canvas


def _fill(name: str) -> str:
    if name.startswith("codes"):
        return KEYS if name.endswith("keys") else VALUES
    return HOT if name.startswith("outlier") else SCALES
