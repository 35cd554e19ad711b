"""Speeds in README.md are those of the result files."""

import json
from pathlib import Path

import pytest

from benchmarks.cpu.processors import processors
from benchmarks.results_page import RESULTS

ROOT = Path(__file__).resolve().parent.parent.parent
README = " ".join((ROOT / "README.md").read_text().split())
HOW_IT_WORKS = " ".join((ROOT / "docs" / "how-it-works.md").read_text().split())


@pytest.mark.parametrize(
    ("file", "method", "says"),
    [
        ("offline-512-calibrated-head", "xquant", "at {:.2f} calibrated"),
        ("epyc/hot-gqa", "joint-4-hot", "{:.2f} `joint`"),
        ("epyc/hot-gqa", "chain-3-hot", "{:.2f} a calibrated chain"),
        ("epyc/hot-mha", "x-hot", "{:.2f} X and"),
        ("epyc/hot-mha", "chain-2-hot", "and {:.2f} a chain of X"),
        ("offline-512-calibrated-joint", "xquant", "Else they decode at {:.2f}, "),
        ("offline-512-chain", "xquant-cl-2", ", {:.2f}, 0"),
        ("epyc/cold-mha", "x", ", {:.2f} and"),
        ("epyc/cold-mha", "chain-2", "and {:.2f}. If"),
    ],
)
def test_decoding_at_equal_batch(file, method, says):
    rows = json.loads((RESULTS / "cpu" / f"{file}.json").read_text())["rows"]
    (ratio,) = (row["decode_ratio"]["median"] for row in rows if row["method"] == method and row["context"] == 512)
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
    assert f"at {min(ratios):.2f} to {max(ratios):.2f} times the speed of 16 bit on CPUs, by processor" in HOW_IT_WORKS


def test_serving_under_memory_pressure():
    *others, best = (f"{ratio:.2f}" for ratio in speeds("pressure", None))
    assert f"served {', '.join(others)} or {best} times as fast" in README
