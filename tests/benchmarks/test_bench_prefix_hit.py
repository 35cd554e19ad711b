"""benchmarks/bench_prefix_hit.py and bench_offline.py with real engines of a tiny model."""

import pytest

from benchmarks import bench_offline, bench_prefix_hit
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


def options(tmp_path, **sizes: int) -> list[str]:
    model = save_tiny_model(tmp_path / "model", "mha")
    words = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    files = ["--model", str(model), "--logs", str(tmp_path), "--out", str(tmp_path / "result.json")]
    return [*files, "--enforce-eager", *words]


@pytest.mark.e2e
@pytest.mark.nightly
def test_the_prefix_is_promoted(tmp_path) -> None:
    arguments = options(tmp_path, prefix=200, question=8, rounds=2, max_model_len=512, cache_mib=2)
    bench_prefix_hit.main([*arguments, "--methods", "chain-2-hot"])
    result = read_json(tmp_path / "result.json")
    assert (result["prefix"], result["absent"]) == (256, {})
    plain, hot = result["rows"]
    assert (plain["cached"], plain["pool_tokens"], plain["promoted_tokens"]) == (0, 0, 0)
    assert (hot["cached"], hot["promoted_tokens"]) == (256, 256)
    assert hot["pool_tokens"] > 256
    assert result["cache_tokens"]["chain-2-hot"] > result["cache_tokens"]["16bit"]


@pytest.mark.e2e
@pytest.mark.nightly
def test_long_contexts_may_have_the_same_prompts(tmp_path) -> None:
    arguments = options(tmp_path, rounds=2, sequences=2, steps=2, max_model_len=512, cache_mib=2, same_prompts=150)
    bench_offline.main([*arguments, "--contexts", "40", "150", "--methods", "x-hot"])
    result = read_json(tmp_path / "result.json")
    assert result["settings"]["x-hot"] == {"bits": 4, "cache": "x", "hot": "50%"}
    rows = {(row["method"], row["context"]): row for row in result["rows"]}
    assert len(rows) == 4
    assert rows["x-hot", 40]["prefill_ratio"]["count"] == rows["x-hot", 150]["decode_ratio"]["count"] == 2
    assert "prefill_ratio" not in rows["x-hot", 150]
    assert rows["x-hot", 40]["hot_share"] == rows["x-hot", 150]["hot_share"] == 1
    assert "hot_share" not in rows["16bit", 40]
