"""Serving meets no kernel that start-up has not compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

from xquant_vllm.attention.gpu.prefill.prefill import ROOM
from xquant_vllm.attention.start_up import LONG_CONTEXT, start_up_batches


def test_variants() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.gpu.variants"],
        cwd=Path(__file__).parents[3],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) > 3
    for case in cases:
        print(case)
        assert sum(case["later"].values()) == 0, case
        # Calibrated layers differ in how long their rows are.
        several = case["case"].startswith("calibrated")
        assert case["started"].get("attend", 0) <= (3 if several else 2)
        assert case["started"].get("attend_heads", 0) <= (12 if several else 2)
        assert sum(case["started"].values()) <= (30 if several else 20)


def test_start_up_batches() -> None:
    assert LONG_CONTEXT > ROOM
    assert start_up_batches(1, 2048, 256, 8192) == [
        ((1, 1),), ((1, 1),) * 256, ((256, 256),), ((256, 8192),), ((1, 1), (256, 256))
    ]  # fmt: skip
    assert start_up_batches(41, 64, 2, 100) == [
        ((1, 1),), ((1, 1),) * 2, ((41, 41),), ((64, 64),), ((64, 100),), ((1, 1), (63, 63))
    ]  # fmt: skip
    assert start_up_batches(1, 1, 1, 1) == [((1, 1),)]
