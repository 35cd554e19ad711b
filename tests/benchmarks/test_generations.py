"""Long generations: what is said of texts, and the benchmark itself."""

import json
import random

import pytest

from benchmarks import long_generation
from benchmarks.accuracy.generations import interval, repetition, row, same_tokens, scores


def test_repetition_is_the_share_of_runs_that_were_there_before():
    assert repetition([1, 2, 3]) == 0
    assert repetition(range(100)) == 0
    # 97 runs of 4, of which all but the first two are repetitions.
    assert repetition([1, 2] * 50) == pytest.approx(95 / 97)
    assert repetition([1, 2, 3, 4, 5, 1, 2, 3, 4]) == pytest.approx(1 / 6)


def test_texts_part_where_they_differ():
    assert same_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert same_tokens([1, 2], [1, 2, 4]) == 2
    assert same_tokens([], [1]) == 0


def test_an_interval_holds_the_mean_and_narrows_with_more_texts():
    drawn = random.Random(0)
    few, many = ([drawn.gauss(5, 1) for _ in range(count)] for count in (16, 1600))
    narrow, wide = interval(many), interval(few)
    assert narrow["low"] < 5 < narrow["high"]
    assert wide["low"] <= wide["mean"] <= wide["high"]
    assert (narrow["high"] - narrow["low"]) * 5 < wide["high"] - wide["low"]
    assert interval(few) == wide, "drawn with a fixed seed"


def test_a_cache_that_gets_worse_with_time_is_seen_part_by_part():
    plain = scores([[1] * 8, [2] * 8], [[1.0] * 8, [2.0] * 8], parts=2, tokens=8)
    worse = scores([[1] * 8, [2] * 5], [[1.0] * 4 + [3.0] * 4, [2.0] * 5], parts=2, tokens=8)
    found = row(worse, plain, same=[4, 5])
    assert found["same_tokens"] == 4.5
    assert found["length"]["mean"] == 6.5
    assert found["difference"]["length"]["mean"] == -1.5
    assert found["difference"]["nll"]["mean"] == pytest.approx(0.5)
    first, second = found["difference_parts"]
    assert (first["texts"], first["mean"]) == (2, 0.0)
    # The second text ended before: only one says something about it.
    assert (second["texts"], second["mean"]) == (1, 2.0)
    itself = row(plain, plain, same=[8, 8])
    assert itself["difference"]["nll"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.nightly
def test_the_benchmark_runs_and_its_baseline_is_itself(smollm2, tmp_path):
    out = tmp_path / "result.json"
    arguments = ["--model", smollm2, "--methods", "xquant", "--prompts", 3, "--prompt", 16, "--tokens", 16]
    arguments += [
        "--dtype",
        "float32",
        "--cache-mib",
        64,
        "--logs",
        tmp_path / "logs",
        "--keep",
        tmp_path / "kept",
        "--out",
        out,
    ]
    result = long_generation.main([str(word) for word in arguments])
    assert json.loads(out.read_text()) == result
    plain, ours = result["rows"]
    assert (plain["method"], plain["same_tokens"], plain["difference"]["nll"]["mean"]) == ("16bit", 16, 0)
    assert ours["method"] == "xquant"
    assert ours["nll"]["mean"] > 0
    assert ours["length"]["mean"] <= 16
