"""benchmarks/bench_cpu.py: its numbers, and which part measures what."""

import json

import pytest

from benchmarks import bench_cpu, bench_decode_attention, bench_offline, bench_prefix_hit, bench_serving
from benchmarks.cpu import hot
from benchmarks.cpu.summary import default_numbers, hot_numbers, operation_numbers
from benchmarks.files import write_json

ATTENTION = {
    "rows": [
        {"variant": "CPU_ATTN BF16", "context": 512, "roof": 0.1, "speed_of_baseline": {"median": 1}},
        {"variant": "xquant 4 bits", "context": 512, "roof": 0.61234, "speed_of_baseline": {"median": 0.94}},
        {"variant": "xquant 4 bits", "context": 4096, "roof": 0.55, "speed_of_baseline": {"median": 0.98123}},
    ]
}


def decoded(context: int, **ratios: float) -> list[dict]:
    return [
        {"method": method.replace("_", "-"), "context": context, "decode_ratio": {"median": ratio}}
        for method, ratio in ratios.items()
    ]


def test_numbers_of_the_operation() -> None:
    assert operation_numbers(ATTENTION) == {"roof_fraction": 0.55, "attention_512": 0.94, "attention_4096": 0.981}


def test_numbers_name_what_is_missing() -> None:
    decode = {512: {"rows": decoded(512, xquant=0.91234)}, 4096: {"rows": decoded(4096, xquant=0.8)}}
    serving = {"rows": [{"method": "xquant", "throughput_ratio": {"median": 3.2}}]}
    assert default_numbers(decode, serving) == {
        "decode_ratio_512": 0.912,
        "decode_ratio_4096": 0.8,
        "pressure_ratio": 3.2,
        "kivi_ratio_512": None,
    }


def hot_results() -> tuple[dict, ...]:
    heads = decoded(512, x_hot=0.95, chain_2_hot=0.9) + decoded(2048, x_hot=0.96, chain_2_hot=0.91)
    groups = decoded(512, chain_3_hot=0.85, joint_4_hot=0.86, xquant_hot=1.01) + decoded(2048, chain_3_hot=0.87)
    cold = decoded(512, x=0.45, chain_2=0.12)
    hits = [{"method": "16bit", "ratio": {"median": 1}}, {"method": "xquant-cl-2", "ratio": {"median": 0.3}}]
    prefix = {"cache_tokens": {"16bit": 100, "xquant-cl-2": 1010}, "rows": hits}
    serving = {"rows": [{"method": "chain-2-hot", "throughput_ratio": {"median": 4.1}}]}
    return {"rows": heads}, {"rows": groups}, {"rows": cold}, prefix, serving


def test_numbers_of_hot_blocks() -> None:
    assert hot_numbers(*hot_results()) == {
        "hot_x_512": 0.95, "hot_cl_512": 0.9, "hot_chain_512": 0.85, "hot_joint_512": 0.86, "hot_head_512": 1.01,
        "hot_x_2048": 0.96, "hot_cl_2048": 0.91, "hot_chain_2048": 0.87, "hot_joint_2048": None, "hot_head_2048": None,
        "cold_x_512": 0.45, "cold_cl_512": 0.12, "capacity_cl": 10.1, "ttft_prefix_hit": 0.3, "pressure_cl": 4.1,
    }  # fmt: skip


@pytest.fixture
def measured(monkeypatch) -> dict[str, list[list[str]]]:
    """What the parts are told instead of measuring, which takes an hour; they answer with figures made up here."""
    told: dict[str, list[list[str]]] = {"offline": [], "prefix": [], "serving": []}
    heads, groups, cold, prefix, serving = hot_results()

    def offline(arguments: list[str]) -> dict:
        # The real options: a part that spells one wrong fails here, and not after half an hour.
        options = bench_offline._options(arguments)
        assert options.max_model_len is None or options.max_model_len >= max(options.contexts) + options.steps
        methods = options.methods
        told["offline"].append(methods)
        default = {"rows": decoded(512, xquant=0.9) + decoded(4096, xquant=0.8)}
        return {"x": cold, "x-hot": heads, "chain-3-hot": groups}.get(methods[0], default)

    def prefix_hit(arguments: list[str]) -> dict:
        told["prefix"].append(bench_prefix_hit._options(arguments).methods)
        return prefix

    def serve(arguments: list[str]) -> int:
        options = bench_serving.parse(arguments)
        told["serving"].append(options.methods)
        rows = [{"method": "xquant", "throughput_ratio": {"median": 3.2}}, *serving["rows"]]
        write_json(options.out, {"rows": rows})
        return 0

    monkeypatch.setattr(bench_decode_attention, "main", lambda _: ATTENTION)
    monkeypatch.setattr(bench_offline, "main", offline)
    monkeypatch.setattr(bench_prefix_hit, "main", prefix_hit)
    monkeypatch.setattr(bench_serving, "main", serve)
    monkeypatch.setattr(hot, "checkpoint", lambda name: name)
    return told


def test_all_of_it(measured, tmp_path, capsys) -> None:
    assert bench_cpu.main(["--out", str(tmp_path)]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    default = {"decode_ratio_512", "decode_ratio_4096", "pressure_ratio", "roof_fraction", "kivi_ratio_512"}
    new = {"attention_512", "attention_4096", "hot_x_512", "hot_cl_512", "hot_chain_512", "cold_x_512", "cold_cl_512",
           "capacity_cl", "ttft_prefix_hit", "pressure_cl"}  # fmt: skip
    assert default | new <= numbers.keys()
    assert measured["serving"] == [["16bit", "xquant"], ["16bit", "chain-2-hot"]]


def test_only_hot(measured, tmp_path, capsys) -> None:
    assert bench_cpu.main(["--only", "hot", "--out", str(tmp_path)]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"hot_x_512", "pressure_cl", "attention_512"} <= numbers.keys()
    assert "decode_ratio_512" not in numbers
    assert measured["offline"] == [
        ["x-hot", "chain-2-hot"], ["x", "chain-2"], ["chain-3-hot", "joint-4-hot", "xquant-hot"]
    ]  # fmt: skip
    assert measured["prefix"] == [["xquant-cl-2"]]
