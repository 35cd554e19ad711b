"""Speeds in README.md are those of the result files."""

import json
from pathlib import Path

import pytest

from benchmarks.results_page import RESULTS

README = " ".join((Path(__file__).resolve().parent.parent.parent / "README.md").read_text().split())


@pytest.mark.parametrize(
    ("file", "method", "says"),
    [
        ("offline-512", "xquant", "at {:.2f} (Intel Xeon)"),
        ("offline-512-chain", "xquant", "or {:.2f} (AMD EPYC) with the default"),
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


def test_serving_under_memory_pressure():
    rows = json.loads((RESULTS / "cpu" / "serving-pressure.json").read_text())["rows"]
    (ratio,) = (row["throughput_ratio"]["median"] for row in rows if row["method"] == "xquant")
    assert f"served {ratio:.2f} times as fast" in README
