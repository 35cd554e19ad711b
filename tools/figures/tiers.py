"""The two tiers: pages of all tokens, and the bounded pool of hot blocks, with who attends to which."""

from figures.canvas import SIZE, Canvas
from figures.palette import COLD, FAINT, GRID, HOT, INK, PAPER

WIDTH, HEIGHT = 380, 426
# Blocks of two requests, and where a block's keys and values are in the pool.
_BLOCKS = {"A": (0, 1, 2), "B": (4, 5, 6, 7)}
_POOLED = {0: 1, 1: 0, 2: 2, 5: 3}
_LEFT, _STEP, _SIZE = 18, 44, 38


def draw() -> Canvas:
    """Draw it."""
    canvas = Canvas(WIDTH, HEIGHT)
    canvas.box(4, 6, WIDTH - 8, 100, PAPER, edge=GRID, line=1.4, rounding=8)
    canvas.words(16, 20, "Pages: all tokens, compressed", align="left", bold=True)
    for block in range(8):
        x = _LEFT + _STEP * block
        used = any(block in blocks for blocks in _BLOCKS.values())
        canvas.box(x, 78, _SIZE, 16, COLD if used else PAPER, dashed=not used, rounding=3)
        if used:
            canvas.words(x + _SIZE / 2, 86, _name(block), size=SIZE - 2)
    for name, blocks in _BLOCKS.items():
        middle = _LEFT + _STEP * (blocks[0] + blocks[-1]) / 2 + _SIZE / 2
        canvas.words(middle, 65, f"blocks of request {name}", size=SIZE - 1.5, color=FAINT)
    canvas.words(16, 38, "what vLLM's scheduler and prefix cache know", align="left", size=SIZE - 1.5, color=FAINT)
    canvas.box(4, 178, WIDTH - 8, 116, PAPER, edge=GRID, line=1.4, rounding=8)
    canvas.words(16, 258, "Hot blocks: a pool of bounded size", align="left", bold=True)
    for block, place in _POOLED.items():
        x, y = _LEFT + _STEP * block + _SIZE / 2, _pool_x(place) + 27
        canvas.arrow((x, 96), (y, 190))
        canvas.box(_pool_x(place), 190, 54, 50, HOT, rounding=3)
        canvas.words(y, 215, _name(block), size=SIZE - 1)
    canvas.box(_pool_x(4), 190, 54, 50, PAPER, dashed=True, rounding=3)
    canvas.words(_pool_x(4) + 27, 215, "free", size=SIZE - 2, color=FAINT)
    canvas.words(16, 277, "keys and values in 16 bit, made from the pages", align="left", size=SIZE - 1.5, color=FAINT)
    canvas.words(368, 142, "rematerialized\nonce, while in use", size=SIZE - 1.5, color=FAINT, align="right")
    _reader(canvas, 312, "Request A: all blocks are hot", "vLLM's own 16-bit kernel reads the pool", HOT)
    _reader(canvas, 368, "Request B: some are not", "this package's kernel reads the pages", COLD)
    return canvas


def _name(block: int) -> str:
    """A block by its request and its place in that."""
    return next(f"{name}{blocks.index(block) + 1}" for name, blocks in _BLOCKS.items() if block in blocks)


def _pool_x(place: int) -> float:
    return _LEFT + 62 * place + 20


def _reader(canvas: Canvas, y: float, title: str, text: str, fill: str) -> None:
    canvas.box(16, y, WIDTH - 32, 46, fill)
    canvas.words(WIDTH / 2, y + 15, title, bold=True, size=SIZE - 0.5, color=INK)
    canvas.words(WIDTH / 2, y + 32, text, size=SIZE - 1.5, color=INK)
