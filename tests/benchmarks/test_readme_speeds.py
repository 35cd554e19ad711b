"""Speeds in README.md are those of the result files."""

import json
from pathlib import Path

import pytest

from benchmarks.cpu.processors import processors
from benchmarks.results_page import RESULTS

README = " ".join((Path(__file__).resolve().parent.parent.parent / "README.md").read_text().split())


@pytest.mark.parametrize(
    ("file", "method", "says"),
    [
        ("offline-512-calibrated-head", "xquant", "at {:.2f} calibrated"),
        ("offline-512-calibrated-joint", "xquant", "at {:.2f} with `joint`"),
        ("offline-512-chain", "xquant-cl-2", "at {:.2f} with a chain"),
        ("offline-512-mha", "xquant", "{:.2f} (X)"),
        ("offline-512-mha", "xquant-cl-2", "{:.2f} (a chain of X)"),
    ],
)
def test_decoding_at_equal_batch(file, method, says):
    rows = json.loads((RESULTS / "cpu" / f"{file}.json").read_text())["rows"]
    (ratio,) = (row["decode_ratio"]["median"] for row in rows if row["method"] == method)
    assert says.format(ratio) in README


def speeds(what: str, context: int | None) -> list[float]:
    """Of all processors that have it, the worst first."""
    found = [processor.ratios.get((what, context)) for processor in processors(RESULTS)]
    return sorted(ratio["median"] for ratio in found if ratio is not None)


@pytest.mark.parametrize("context", [512, 4096])
def test_the_default_by_processor(context):
    ratios = ", ".join(f"{ratio:.2f}" for ratio in speeds("decode", context))
    assert f"{ratios} with {context:,} tokens" in README


def test_the_default_from_the_worst_to_the_best():
    ratios = [*speeds("decode", 512), *speeds("decode", 4096)]
    assert f"at {min(ratios):.2f} to {max(ratios):.2f} times the 16-bit speed, by processor" in README


def test_serving_under_memory_pressure():
    ratios = " or ".join(f"{ratio:.2f}" for ratio in speeds("pressure", None))
    assert f"served {ratios} times as fast" in README
