"""Speculative decoding by a draft model, whose layers keep a compressed cache of their own."""

import pytest

from tests.e2e.families.test_families import ENGINE, PROMPT

pytestmark = pytest.mark.e2e

TOKENS = 24
# Two sequences, one of which is found in the prefix cache the second time.
GREEDY = {"kind": "greedy", "prompts": [PROMPT[:100], PROMPT[20:60]], "max_tokens": TOKENS}
TASKS = [GREEDY, GREEDY, {"kind": "feature", "name": "drafted"}]
SETTINGS = {**ENGINE, "max_num_batched_tokens": 256, "disable_log_stats": False}


def speculate(engines, folder, xquant, **speculative):
    """Greedy tokens without and with speculation, and the share of drafted tokens that were accepted."""
    settings = {**SETTINGS, "xquant": xquant}
    plain = engines.run(folder, "xquant", TASKS[:2], **settings)
    speculative = {"num_speculative_tokens": 3, **speculative}
    drafted = engines.run(folder, "xquant", TASKS, speculative_config=speculative, **settings)
    for ours, expected in zip(drafted.tasks[:2], plain.tasks, strict=True):
        assert ours["tokens"] == expected["tokens"]
    assert drafted.tasks[1]["cached"][0] > 0
    counts = drafted.tasks[2]
    assert counts["drafted"] >= TOKENS
    return counts["accepted"] / counts["drafted"], drafted


def test_a_compressed_draft(engines, tiny):
    """The model drafts for itself, so that nearly all drafts are accepted; it alone has a pool of hot blocks."""
    folder = tiny("qwen2")
    accepted, drafted = speculate(
        engines,
        folder,
        {"bits": 8, "cache": "x"},
        method="draft_model",
        model=str(folder),
        attention_backend="xquant",
    )
    assert accepted > 0.9
    assert "hot blocks:" in drafted.log
    assert drafted.log.count("xquant: layers 0-2 are compressed, which is all") == 2
