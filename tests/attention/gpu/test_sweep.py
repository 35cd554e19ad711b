"""What serving can ask for fits every GPU: the largest tiles always, all formats in `make test-nightly`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What did not fit 8.6 and 8.9 before tiles were chosen by device: wide heads, and FP32.
WORST = [
    "prefill: 4 bits, heads of 128 by 4 in fp32",
    "prefill: 4 bits, heads of 256 by 4 in bf16",
]


def _sweep(*options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.gpu.sweep", *options],
        cwd=Path(__file__).parents[3],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_largest_tiles() -> None:
    _sweep("86", "--only", *WORST)


@pytest.mark.nightly
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_every_format(capability: int) -> None:
    _sweep(str(capability), "--spread")
