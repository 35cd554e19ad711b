"""benchmarks/bench_serving.py with a real server and vLLM's own client, as small as it can be."""

import pytest

from benchmarks import bench_serving
from benchmarks.files import read_json
from benchmarks.serving.sizes import Sizes

TINY = Sizes(
    12,
    {"turns": 3, "history_tokens": 300, "turn_tokens": 20, "output_tokens": 4},
    {"requests": 1, "rate": 1.0, "prompt_tokens": 1, "output_tokens": 1},
)


@pytest.mark.e2e
@pytest.mark.nightly
def test_a_load_is_served_and_measured(smollm2, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_serving, "QUICK", TINY)
    out = tmp_path / "result.json"
    arguments = ["--quick", "--model", str(smollm2), "--methods", "turboquant", "xquant", "--max-model-len", "512"]
    assert bench_serving.main([*arguments, "--out", str(out), "--logs", str(tmp_path)]) == 0
    result = read_json(out)
    assert set(result["absent"]) == {"turboquant"}
    (row,) = result["rows"]
    # Keys and values of 64 channels: codes of 4 bits, scale and zero, and the keys' outlier.
    block = 128 * 30 * 3 * (38 + 36)
    assert row["cache_tokens"] == (12 << 20) // block * 128
    users = result["trace"]["users"]
    numbers = {name: spread["median"] for name, spread in row["numbers"].items()}
    assert (numbers["completed"], numbers["total_output_tokens"]) == (users * 3, users * 3 * 4)
    assert numbers["total_input_tokens"] == pytest.approx(users * (300 + 320 + 340), rel=0.01)
    assert 1 <= numbers["peak_running"] <= result["trace"]["concurrency"]
    # Every turn but the first finds two blocks of 128 tokens.
    assert numbers["prefix_hit_rate"] > 0.3
    assert all(numbers[f"{which}_{what}_ms"] > 0 for which in ("mean", "p99") for what in ("ttft", "tpot", "itl"))
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "Not here: TurboQuant 4 bits: vLLM's TurboQuant kernels are for GPUs" in capsys.readouterr().out
