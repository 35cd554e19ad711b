"""What a command is doing, on standard error: lines for what takes a while, bars for what can be counted."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def say(line: str) -> None:
    """Print a line that starts with ``xquant:``, above any bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        print(f"xquant: {line}", file=sys.stderr, flush=True)


def counted_bar(items: Iterable[Item], total: int, doing: str, unit: str) -> Iterator[Item]:
    """Yield items, and show how many there have been.

    Args:
        items: the items.
        total: how many there will be.
        doing: what is done with them, which stands before the bar.
        unit: what one of them is.
    """
    # A context, so that an error or Ctrl-C ends the bar's line before anything else is printed.
    with bar(total, doing, unit) as shown:
        for item in items:
            yield item
            shown.update()


def bar(total: int, doing: str, unit: str) -> Any:
    """A bar that is moved by hand; a context."""
    return tqdm(total=total, desc=doing, unit=unit)
