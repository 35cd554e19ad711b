"""Speculative decoding by models and heads that draft, whose layers keep a cache of their own: 16 bit or compressed."""

import pytest

from tests.e2e.engine import EngineFailed
from tests.e2e.families.test_families import ENGINE, PROMPT
from tests.e2e.features.heads import save_eagle3_head, save_eagle_head, with_embeddings

pytestmark = pytest.mark.e2e

TOKENS = 24
# Two sequences, one of which is found in the prefix cache the second time.
GREEDY = {"kind": "greedy", "prompts": [PROMPT[:100], PROMPT[20:60]], "max_tokens": TOKENS}
TASKS = [GREEDY, GREEDY, {"kind": "feature", "name": "drafted"}]
SETTINGS = {**ENGINE, "max_num_batched_tokens": 256, "disable_log_stats": False}
# Pages of X have a pool of hot blocks by default.
POOL = {"bits": 8, "cache": "x"}
COMPRESSED = {"attention_backend": "xquant"}
KEPT = "xquant: of the draft, layers {} keep keys and values (CPU_ATTN)"
ALL = "xquant: layers {} are compressed, which is all"


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """The model that is served; a head for EAGLE is a copy of it."""
    return with_embeddings(tiny("llama"), tmp_path_factory.mktemp("model") / "model", 1.0)


@pytest.fixture(scope="module")
def head(model, tmp_path_factory):
    return save_eagle_head(tmp_path_factory.mktemp("head"), model)


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
    print(f"{counts['accepted']} of {counts['drafted']} accepted, {drafted.cache_tokens} tokens cached")
    return counts["accepted"] / counts["drafted"], drafted


def test_a_compressed_draft(engines, model):
    """The model drafts for itself, so that nearly all drafts are accepted; it alone has a pool of hot blocks."""
    accepted, drafted = speculate(engines, model, POOL, method="draft_model", model=str(model), **COMPRESSED)
    assert accepted > 0.9
    assert "of the cache keep the keys and values" in drafted.log
    assert drafted.log.count(ALL.format("0-2")) == 2


def test_an_eagle_head_that_keeps_keys_and_values(engines, model, head):
    """Pages of two kinds and sizes, of two backends, in the same blocks."""
    accepted, drafted = speculate(engines, model, POOL, method="eagle", model=str(head))
    assert accepted > 0.3
    assert KEPT.format("3-5") in drafted.log


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("xquant", "least"), [(POOL, 0.9), ({"bits": 4, "cache": "latent"}, 0.5), ({"method": "xquant-cl"}, 0.2)], ids=str
)
def test_a_draft_that_keeps_keys_and_values(engines, model, xquant, least):
    """The same model in 16 bit is of the opinion of 8 bits, and less so of that of 4 or of a chain."""
    accepted, drafted = speculate(engines, model, xquant, method="draft_model", model=str(model))
    assert accepted > least
    assert KEPT.format("0-2") in drafted.log


@pytest.mark.nightly
@pytest.mark.parametrize("xquant", [POOL, {"bits": 8, "cache": "latent"}, {"method": "xquant-cl"}], ids=str)
def test_a_compressed_eagle_head(engines, model, head, xquant):
    accepted, drafted = speculate(engines, model, xquant, method="eagle", model=str(head), **COMPRESSED)
    assert accepted > 0.3
    assert ALL.format("3-5") in drafted.log


@pytest.mark.nightly
@pytest.mark.parametrize("compressed", [{}, COMPRESSED], ids=["16 bit", "compressed"])
def test_an_eagle3_head(engines, tiny, tmp_path, compressed):
    model = with_embeddings(tiny("llama"), tmp_path / "model", 0.05)
    head = save_eagle3_head(tmp_path / "head", model)
    xquant = {"bits": 8, "cache": "latent"}
    accepted, drafted = speculate(engines, model, xquant, method="eagle3", model=str(head), **compressed)
    assert accepted > 0.1
    assert (ALL if compressed else KEPT).format("3-5") in drafted.log


@pytest.mark.nightly
def test_a_draft_beside_layers_with_windows(engines, tiny):
    """Layers of several kinds get pages of one size in vLLM, which this draft's do not have."""
    xquant = {"bits": 8, "cache": "latent"}
    draft = {"method": "draft_model", "model": str(tiny("llama")), "num_speculative_tokens": 3}
    with pytest.raises(EngineFailed) as error:
        engines.run(tiny("gemma3"), "xquant", [], xquant=xquant, speculative_config=draft, **SETTINGS)
    said = error.value.log.strip().splitlines()[-1]
    assert "speculative decoding with a draft is not supported for Gemma3ForCausalLM" in said
