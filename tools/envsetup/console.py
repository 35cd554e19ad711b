"""What set-up says, and how it stops."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

_started = time.monotonic()


class SetupError(Exception):
    """Set-up cannot go on; the message says what, why and what to do."""


def say(text: str) -> None:
    """One line of progress, with the time since the start."""
    print(f"[setup {time.monotonic() - _started:4.0f}s] {text}", flush=True)


def first_line_of_error(stderr: str) -> str:
    """The last line that a Python traceback closes on, which names the exception."""
    lines = [line for line in stderr.splitlines() if line and not line.startswith(" ")]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (named or lines or ["no message"])[-1][:300]


def run_python(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run a snippet with the environment's Python, its output kept."""
    return subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def stop(message: str) -> int:
    """Print an error the way all of set-up's errors look; returns the exit code."""
    print(f"setup: error: {message}", file=sys.stderr, flush=True)
    return 1
