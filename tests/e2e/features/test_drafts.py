"""Speculative decoding by a draft model or an EAGLE head, whose layers keep a cache of their own."""

import pytest

from tests.e2e.features.checkpoints import save_eagle_head
from tests.e2e.test_families import ENGINE, PROMPT

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


def test_the_model_drafts_for_itself(engines, tiny):
    """In 16 bit: nearly all drafts are accepted."""
    folder = tiny("qwen2")
    accepted, _ = speculate(engines, folder, {"bits": 8, "cache": "latent"}, method="draft_model", model=str(folder))
    assert accepted > 0.9


def test_a_compressed_draft(engines, tiny):
    """The same, its pages as small as those of the model, which has a pool of hot blocks for itself."""
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


def test_an_eagle_head(engines, tiny, tmp_path):
    """A random one, whose drafts are hardly ever right."""
    head = save_eagle_head(tmp_path / "head", tiny("llama"))
    accepted, _ = speculate(engines, tiny("llama"), {"bits": 4, "cache": "latent"}, method="eagle", model=str(head))
    assert accepted < 0.5
