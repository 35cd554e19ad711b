"""benchmarks/bench_prefix_hit.py with real engines of a tiny model: what it says was promoted was."""

import pytest

from benchmarks import bench_prefix_hit
from benchmarks.bench_prefix_hit import rows
from benchmarks.files import read_json
from tests.tiny_models import save_tiny_model


def answer(seconds: float, promoted: int = 0) -> dict:
    return {"seconds": seconds, "cached": 1536, "pool_tokens": 2000, "promoted_tokens": promoted, "hot_rows": 1,
            "cold_rows": 0}  # fmt: skip


def test_a_share_is_of_the_same_round() -> None:
    taken = {"16bit": [answer(1.0), answer(4.0)], "xquant-cl-2": [answer(0.5, 1536), answer(1.0, 1536)]}
    plain, ours = rows(taken)
    assert plain["ratio"]["median"] == 1
    assert ours["ratio"]["median"] == 0.375
    assert ours["milliseconds"]["median"] == 750
    assert ours["promoted_tokens"] == 1536


@pytest.mark.e2e
def test_the_prefix_is_promoted(tmp_path) -> None:
    model, out = save_tiny_model(tmp_path / "model", "mha"), tmp_path / "result.json"
    sizes = {"prefix": 200, "question": 8, "rounds": 2, "max-model-len": 512, "cache-mib": 2}
    arguments = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    arguments += ["--enforce-eager", "--methods", "chain-2-hot", "--out", str(out), "--logs", str(tmp_path)]
    bench_prefix_hit.main(["--model", str(model), *arguments])
    result = read_json(out)
    assert (result["prefix"], result["absent"]) == (256, {})
    plain, hot = result["rows"]
    assert (plain["cached"], plain["pool_tokens"], plain["promoted_tokens"]) == (0, 0, 0)
    assert (hot["cached"], hot["promoted_tokens"]) == (256, 256)
    assert hot["pool_tokens"] > 256
    assert result["cache_tokens"]["chain-2-hot"] > result["cache_tokens"]["16bit"]
