"""What a command is doing, on standard error: lines for what takes a while, bars for what can be counted.

A server's log has no place for bars: there they are lines, a few for each (:func:`in_lines`).
"""

import sys
import time
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
    return _Lines(total, doing, unit) if _Lines.wanted else tqdm(total=total, desc=doing, unit=unit)


def in_lines() -> None:
    """Show lines instead of bars, from now on in this process."""
    _Lines.wanted = True


class _Lines:
    """Counts as a bar does, and says so now and then."""

    wanted = False
    # No more often than this, but for the last one.
    _SECONDS = 5

    def __init__(self, total: int, doing: str, unit: str) -> None:
        self._total, self._doing, self._unit, self._done = total, doing, unit, 0
        self._start = self._said = time.perf_counter()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.perf_counter()
        if self._done == self._total or now - self._said >= self._SECONDS:
            self._said = now
            taken = now - self._start
            left = taken / self._done * (self._total - self._done)
            rest = f", about {left:.0f} s left" if self._done < self._total else ""
            say(f"{self._doing}: {self._unit} {self._done} of {self._total} done after {taken:.0f} s{rest}")

    def set_postfix_str(self, text: str) -> None:
        """Lines say how long it takes themselves."""
