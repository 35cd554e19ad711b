"""Two groups of sequences take turns, and the pool does not hold both: what is promoted pays."""

import json

import pytest

from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.e2e

BLOCK, PROMPT, ROWS, OUTPUT = 16, 96, 4, 12
# Of the blocks of both groups, three quarters fit.
POOL = 3 * 2 * ROWS * -(-(PROMPT + OUTPUT) // BLOCK) // 4 * BLOCK
ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 16 << 20,
    "max_num_seqs": 8,
    "block_size": BLOCK,
}


@pytest.mark.parametrize("turns", [2, pytest.param(40, marks=pytest.mark.nightly)])
def test_sets_that_take_turns_do_not_thrash(engines, tmp_path, turns):
    model = save_tiny_model(tmp_path, "mha")
    config = json.loads((model / "config.json").read_text())
    per_token = 2 * config["num_hidden_layers"] * config["hidden_size"] * 4
    prompts = [[3 + (31 * row + 7 * i * i + i) % 300 for i in range(PROMPT)] for row in range(2 * ROWS)]
    task = {"kind": "hot_turns", "groups": [prompts[:ROWS], prompts[ROWS:]], "turns": turns, "max_tokens": OUTPUT}
    settings = {"bits": 16, "method": "xquant-cl", "cache": "x", "first_layers": 1}
    hot, cold = (
        engines.run(model, "xquant", [task], xquant={**settings, "hot": size}, **ENGINE)
        for size in ((POOL + BLOCK) * per_token, 0)
    )
    (ours,), (theirs,) = hot.tasks, cold.tasks
    assert ours["tokens"] == theirs["tokens"]
    counts = ours["counts"][-1]
    rows = counts["hot_rows"] + counts["cold_rows"]
    print(f"{turns} turns: {counts}")
    # A token is promoted in the time in which four are attended from pages.
    assert 4 * counts["promoted_tokens"] <= counts["hot_rows"] * PROMPT
    assert counts["hot_rows"] >= 0.45 * rows
    if turns > 2:
        assert f"in all {counts['hot_rows']:,} rows of batches were attended from the pool" in hot.log
