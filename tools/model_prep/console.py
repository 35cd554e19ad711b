"""Progress goes to stderr: the last line on stdout is the folder, for scripts."""

from __future__ import annotations

import sys
import time

_started = time.monotonic()


def say(text: str) -> None:
    """One line of progress, with the time since the start."""
    print(f"[model {time.monotonic() - _started:4.0f}s] {text}", file=sys.stderr, flush=True)
