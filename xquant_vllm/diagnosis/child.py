"""Facts that a process of its own finds out: what is imported there may be broken, hang, or end it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xquant_vllm.errors import cause_of

_ROOT = Path(__file__).resolve().parents[2]
# The working directory is nobody's package.
_CODE = "import sys; sys.path[:] = [path for path in sys.path if path] + [sys.argv[1]]; from {0} import main; main()"

Section = tuple[str, Callable[[], Any]]
"""A name, and what finds its facts, as JSON."""


@dataclass(frozen=True)
class Found:
    """What a process has found out.

    Attributes:
        sections: facts by section, those of which it came to know.
        errors: by section, what kept it from finding out.
        ended: why the process ended before it was done; None if it was.
    """

    sections: dict[str, Any]
    errors: dict[str, str]
    ended: str | None


def find_out(module: str, *arguments: str, seconds: int = 300) -> Found:
    """Run a module's ``main``, which calls :func:`tell`.

    Args:
        module: its name.
        arguments: for it.
        seconds: how long it may take.
    """
    command = [sys.executable, "-c", _CODE.format(module), str(_ROOT), *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        said, complaints = process.communicate(timeout=seconds)
        ended = None if process.returncode == 0 else _why(process.returncode, complaints)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        ended = f"took more than {seconds} seconds"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    sections: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name, facts, error in _told(said):
        if error is None:
            sections[name] = facts
        else:
            errors[name] = error
    return Found(sections, errors, ended)


def tell(sections: Iterator[Section]) -> None:
    """Find facts out, section by section, and tell each at once. For the process that :func:`find_out` starts.

    Args:
        sections: what to find out; an error ends its section, and those after it are still asked.
    """
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no result
    for name, find in sections:
        facts, error = None, None
        try:
            facts = find()
        except (Exception, SystemExit) as problem:
            kind, cause = type(problem).__name__, cause_of(problem)
            error = cause if cause.startswith(kind) else f"{kind}: {cause}"
        print(json.dumps([name, facts, error]), file=results, flush=True)
    results.flush()
    # Threads of libraries may not end.
    os._exit(0)


def _told(said: bytes) -> Iterator[tuple[str, Any, str | None]]:
    for line in said.decode(errors="replace").splitlines():
        try:
            name, facts, error = json.loads(line)
        except ValueError:  # cut off
            continue
        yield name, facts, error


def _why(status: int, complaints: bytes) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = [line.strip() for line in complaints.decode(errors="replace").splitlines() if line.strip()]
    return f"ended with exit status {status}{': ' + lines[-1] if lines else ''}"
