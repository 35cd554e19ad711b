"""Make the datasets of the tasks beside this file, from what packages ship.

Usage: python make_dataset.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from makers import functions, orders, passages, world
from makers.packages import MissingPackageError


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path) -> None:
    """Write all datasets.

    Raises:
        MissingPackageError: a package that they are made from is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "continuations.jsonl", passages.continuations())
    write(folder / "pages.jsonl", passages.pages())
    write(folder / "orders.jsonl", orders.questions())
    write(folder / "functions.jsonl", functions.questions())
    questions, shots = world.questions()
    write(folder / "world.jsonl", questions)
    write(folder / "world-shots.jsonl", shots)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
    except MissingPackageError as error:
        sys.exit(f"make_dataset: {error}")
