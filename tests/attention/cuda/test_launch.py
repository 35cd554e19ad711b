"""The decode kernel, run by the emulation, in the place that launch.py gives it before the Triton merge kernel."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_launch(library) -> None:
    script = Path(__file__).with_name("through_launch.py")
    root = script.parents[3]
    command = [sys.executable, "-m", ".".join(script.relative_to(root).with_suffix("").parts), library._name]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
