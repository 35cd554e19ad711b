"""Draws the figures of docs/how-it-works.md into docs/pictures: `make pictures`.

    python tools/draw_figures.py [--out FOLDER]

They are SVG files for light pages; the site makes dark ones of them (figures/palette.py).
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for benchmarks

from figures import accuracy, canvas, page_bytes, tiers, token_way  # noqa: E402


def draw_all(folder: Path) -> list[Path]:
    """Draw all into a folder; returns their files."""
    drawn = {
        "token-way": (token_way.draw().figure, ""),
        "tiers": (tiers.draw().figure, ""),
        "page-bytes": (page_bytes.draw().figure, ""),
        "accuracy-per-byte": (accuracy.draw(), json.dumps(accuracy.numbers())),
    }
    for name, (figure, numbers) in drawn.items():
        canvas.save(figure, folder / f"{name}.svg", numbers)
    return [folder / f"{name}.svg" for name in drawn]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", metavar="FOLDER")
    for path in draw_all(parser.parse_args().out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
