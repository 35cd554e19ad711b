"""Result files."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json(path: Path, result: Any) -> None:
    """Write a result in one step: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def report(
    result: dict[str, Any], text: Callable[[dict[str, Any]], str], options: argparse.Namespace
) -> dict[str, Any]:
    """Print a result, and write it where ``--out`` says.

    Args:
        result: of a benchmark.
        text: makes what people read of it.
        options: with ``out``, a file or None, and ``json``, for one line of JSON instead of the text.

    Returns:
        The result.
    """
    if options.out:
        write_json(options.out, result)
    print(json.dumps(result) if options.json else text(result))
    return result


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote."""
    return json.loads(path.read_text())
