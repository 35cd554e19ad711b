"""Result files."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, result: Any) -> None:
    """Write a result in one step: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote."""
    return json.loads(path.read_text())
