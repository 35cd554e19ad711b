"""A load from a file of hash ids: its blocks, its scale, and what a real server finds of it."""

import json
import random

import pytest

from benchmarks import bench_serving
from benchmarks.files import read_json
from benchmarks.serving.trace_file import Scale, file_trace
from xquant_vllm.errors import RefusedError
from xquant_vllm.planning.traces.replay import Rates


def written(path, requests):
    lines = [
        {"timestamp": 1000 * number, "input_length": length, "output_length": 64, "hash_ids": ids}
        for number, (length, ids) in enumerate(requests)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_blocks_are_equal_where_ids_are(tmp_path):
    file = written(tmp_path / "trace.jsonl", [(1500, [1, 2, 3]), (1024, [1, 2]), (1100, [4, 2, 5])])
    load = file_trace(file, Scale(1 / 16, 0.5), 1000, 4096)
    first, second, third = load.prompts
    assert [len(prompt) for prompt in load.prompts] == [94, 64, 69]
    assert first[:64] == second
    assert first[32:64] == third[32:64]
    assert first[:32] != third[:32]
    assert min(map(min, load.prompts)) >= 100
    assert max(map(max, load.prompts)) < 1000
    assert [request.time for request in load.trace.requests] == [0, 0.5, 1]
    assert [request.output for request in load.trace.requests] == [4, 4, 4]
    assert load.trace.requests[0].blocks == (1, 2)
    assert load.planned_hit_rate(10_000, Rates()) == pytest.approx(32 / (94 + 64 + 69))
    assert file_trace(file, Scale(1 / 16, 0.5), 1000, 4096) == load


def test_long_requests_are_left_out_and_the_head_is_taken(tmp_path):
    file = written(tmp_path / "trace.jsonl", [(1500, [1, 2, 3]), (512, [1]), (512, [2])])
    assert len(file_trace(file, Scale(1 / 16), 1000, 50).prompts) == 2
    assert len(file_trace(file, Scale(1 / 16, requests=2), 1000, 4096).prompts) == 2
    with pytest.raises(RefusedError, match="has no request of up to 10 tokens"):
        file_trace(file, Scale(1 / 16), 1000, 10)


@pytest.mark.parametrize("lengths", [0.3, 0.0, 1 / 1024])
def test_a_block_keeps_whole_tokens(lengths):
    with pytest.raises(RefusedError, match="--trace-scale-lengths"):
        _ = Scale(lengths).block_size


@pytest.mark.e2e
@pytest.mark.nightly
@pytest.mark.parametrize("method", ["16bit", "xquant"])
def test_a_server_finds_what_was_planned(smollm2, tmp_path, method):
    """Ten users whose histories grow, in random order; a cache for about half of them."""
    drawn = random.Random(0)
    order = [user for user in range(10) for _ in range(6)]
    drawn.shuffle(order)
    turns = dict.fromkeys(range(10), 1)
    requests = []
    for user in order:
        turns[user] += 1
        requests.append((512 * turns[user] + 200, [100 * user + block for block in range(turns[user] + 1)]))
    file = written(tmp_path / "trace.jsonl", requests)
    out = tmp_path / "result.json"
    # 16 bit: 23,040 bytes a token.
    arguments = ["--methods", method, "--trace-file", str(file), "--trace-scale-lengths", "0.0625"]
    arguments += [
        "--trace-scale-times",
        "0.2",
        "--block-size",
        "32",
        "--cache-mib",
        "24" if method == "16bit" else "12",
    ]
    arguments += ["--max-model-len", "512", "--repeats", "1", "--enforce-eager", "--model", str(smollm2)]
    assert bench_serving.main([*arguments, "--out", str(out), "--logs", str(tmp_path)]) == 0
    result = read_json(out)
    (row,) = result["rows"]
    numbers = {name: spread["median"] for name, spread in row["numbers"].items()}
    assert numbers["completed"] == 60
    assert 0.1 < numbers["prefix_hit_rate"] < result["trace"]["endless_hit_rate"] - 0.05
    assert numbers["prefix_hit_rate"] == pytest.approx(numbers["planned_hit_rate"], abs=0.03)
