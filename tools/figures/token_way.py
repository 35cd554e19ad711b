"""The way of a token: from the input of a layer to codes in a page, and back to keys and values in attention."""

from figures.canvas import SIZE, Canvas
from figures.model import BITS, HEAD_SIZE, HIDDEN, KV_HEADS, PAGE, SIXTEEN_BIT_BYTES
from figures.palette import COLD, FAINT, GRID, INPUT, KEYS, PAPER, SCALES, VALUES

WIDTH, HEIGHT = 380, 640


def draw() -> Canvas:
    """Draw it."""
    canvas = Canvas(WIDTH, HEIGHT)
    both = 2 * KV_HEADS * HEAD_SIZE
    _frame(canvas, 8, 226, "Write: once per token")
    canvas.labelled(75, 34, 230, 38, INPUT, "layer input X", f"{HIDDEN} numbers")
    canvas.arrow((190, 72), (190, 100), "times the down-projection")
    canvas.labelled(75, 100, 230, 38, KEYS, "latents of keys and of values", f"{both} numbers")
    canvas.arrow((190, 138), (190, 166), f"quantized to {BITS} bits")
    canvas.labelled(75, 166, 230, 54, SCALES, "codes, scales and zero points", _bytes())
    canvas.arrow((190, 220), (190, 258))
    canvas.labelled(40, 258, 300, 46, COLD, "a slot in a page of vLLM's cache", "all that is kept of the token")
    _frame(canvas, 328, 304, "Read: for every later token")
    canvas.arrow((270, 304), (270, 360))
    canvas.labelled(75, 360, 230, 26, SCALES, "latents, decoded from codes")
    canvas.arrow((130, 386), (100, 430))
    canvas.words(30, 407, "key latents", size=SIZE - 2, color=FAINT, align="left")
    canvas.labelled(18, 430, 168, 56, KEYS, "keys", "up-projection,\nnorm and RoPE")
    canvas.arrow((100, 486), (100, 512), "scores, softmax")
    canvas.labelled(18, 512, 168, 28, PAPER, "attention weights")
    canvas.arrow((186, 526), (212, 526))
    canvas.arrow((250, 386), (282, 512))
    canvas.words(277, 440, "value latents", size=SIZE - 2, color=FAINT, align="left")
    canvas.labelled(212, 512, 150, 28, VALUES, "weighed latents")
    canvas.arrow((287, 540), (287, 570))
    canvas.labelled(130, 570, 232, 50, VALUES, "attention output", "values' up-projection,\nonce, behind the sum")
    return canvas


def _bytes() -> str:
    return f"{PAGE.bytes_per_token} bytes\nkeys and values in 16 bit: {SIXTEEN_BIT_BYTES} bytes"


def _frame(canvas: Canvas, y: float, height: float, title: str) -> None:
    canvas.box(4, y, WIDTH - 8, height, PAPER, edge=GRID, line=1.4, rounding=8)
    canvas.words(16, y + 13, title, align="left", bold=True)
