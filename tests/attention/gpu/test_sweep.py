"""What serving can ask for fits every GPU: the largest tiles always, all formats in `make test-nightly`."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.attention.gpu.compiled import Compiled
from tests.attention.gpu.sweep import SPILLS, problem, refused_at_start
from tests.attention.gpu.sweep_cases import served

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


@pytest.mark.parametrize(
    ("stack", "shared", "words"),
    [
        (SPILLS["attend_heads"], 232448, None),
        (SPILLS["attend_heads"] + 8, 0, "at most 64 are allowed"),
        (0, 232449, "232449 bytes of shared memory of 232448"),
    ],
)
def test_what_is_a_problem(stack: int, shared: int, words: str | None) -> None:
    said = problem(Compiled("attend_heads", "decode", 90, 255, stack, shared, 4, True))
    assert said is None if words is None else words in str(said)


def test_fp32_that_does_not_fit_is_refused_by_name() -> None:
    large = Compiled("kivi_attend", "prefill: KIVI 4, heads of 128 by 8 in fp32", 86, 255, 0, 114688, 8, True)
    assert refused_at_start(large)
    assert not refused_at_start(replace(large, case="prefill: KIVI 4, heads of 128 by 8 in bf16"))
    assert not refused_at_start(replace(large, shared=101376))


def test_what_is_served_by_default() -> None:
    """`make cuda-check` compiles these for all GPUs."""
    assert [name for name, _ in served()] == ["decode", "prefill", "store 4", "store 256"]


def test_largest_tiles() -> None:
    _sweep("86", "--only", *WORST)


@pytest.mark.nightly
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_every_format(capability: int) -> None:
    _sweep(str(capability), "--spread")
