"""Parts of the serving benchmark that need no server."""

import pytest

from benchmarks import bench_serving
from benchmarks.cpu.timing import Spread, in_turns, ratios
from benchmarks.files import write_json
from benchmarks.methods import METHODS
from benchmarks.serving import metrics, report


def test_counts_are_summed_over_labels() -> None:
    text = """# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_preemptions_total{engine="0"} 1e+01
process_start_time_seconds 1.7e9
"""
    assert metrics.parse(text)["vllm:num_requests_running"] == 5
    assert metrics.parse(text)["vllm:num_preemptions_total"] == 10


def test_spread() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.least, spread.low, spread.median, spread.high, spread.most) == (1, 2, 3, 4, 5)
    assert Spread.of([2.0]).scaled(10)["high"] == 20
    assert Spread.of([2.0, 4.0]).low >= 2


def test_turns_and_ratios() -> None:
    order: list[str] = []
    taken = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 3, "b": 3}
    assert ratios({"a": [1.0, 2.0], "b": [2.0, 8.0]}, "a", "b").median == 3


def run(throughput: float) -> dict:
    numbers = dict.fromkeys((key for key, _, _ in report.COLUMNS), 1.0)
    return numbers | {"total_token_throughput": throughput}


def test_ratios_are_of_the_same_repeat(tmp_path) -> None:
    runs = {"16bit": [run(10), run(20)], "xquant": [run(30), run(80)]}
    rows = report.summarize(runs, {"16bit": 100, "xquant": 350})
    assert rows[1]["throughput_ratio"]["median"] == 3.5
    assert rows[1]["numbers"]["total_token_throughput"]["median"] == 55
    result = {"rows": rows, "absent": {"fp8": "no"}, "model": "m", "cache_mib": 1,
              "trace": {"name": "pressure", "requests": 2}}  # fmt: skip
    text = report.table(result)
    assert "| xquant 4 bits | 350 | 1.00 | 55.0 |" in text
    assert "3.50x (3.00-4.00)" in text
    assert "FP8: no" in text
    report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_methods_as_flags() -> None:
    flags = METHODS["xquant-cl"].flags()
    assert flags[:2] == ["--attention-backend", "xquant"]
    assert flags[3] == '{"xquant": {"method": "xquant-cl", "calibration": "none", "bits": 4}}'
    assert METHODS["16bit"].flags() == []


def test_result_files_are_whole(tmp_path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"bad": object()})
    assert not list(tmp_path.iterdir())


def test_quick_is_short() -> None:
    options = bench_serving.parse(["--quick"])
    assert (options.methods, options.repeats, options.enforce_eager) == (["16bit", "xquant"], 1, True)
    assert bench_serving.parse(["--quick", "--backends", "kivi"]).methods == ["kivi"]
