"""Hybrid models: their attention layers are compressed, and the states of the others are left as they are."""

import math
import re

import pytest

from tests.e2e.families.test_families import EIGHT, ENGINE, assert_close
from tests.family_coverage import LATENTS
from tests.tiny_hybrids import save_tiny_hybrid

pytestmark = pytest.mark.e2e

# Longer than two blocks, whose tokens the states decide.
PROMPT = [(7 * i * i + 3 * i + 5) % 300 + 3 for i in range(600)]
LOGITS = {"kind": "next_logits", "prompts": [PROMPT]}
TASKS = [LOGITS, LOGITS, {"kind": "prompt_logprobs", "prompts": [PROMPT]}]
LONGEST = 1024
LONG = {"max_model_len": LONGEST, "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def serve(engines, tmp_path_factory):
    folders = {}

    def serve(family, backend, tasks=TASKS, **settings):
        if family not in folders:
            folders[family] = save_tiny_hybrid(tmp_path_factory.mktemp(family), family)
        return engines.run(folders[family], backend, tasks, **{**ENGINE, **LONG, **settings})

    return serve


def hybrid(family, name, layers, states, *features):
    features = (*features, "states beside it", "bits=8", "prefix caching", "chunked prefill")
    return pytest.param(family, layers, states, id=family, marks=pytest.mark.covers(name, *features, *LATENTS))


def block_size(result):
    """Tokens of a block, as vLLM has aligned it with the states."""
    return int(re.search(r"Setting attention block size to (\d+) tokens", result.log)[1])


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize(
    ("family", "layers", "states"),
    [
        hybrid("nemotron-h", "Nemotron-H", "1, 4", 2, "rope=none"),
        hybrid("granite-4", "Granite 4 (hybrid)", "1, 3", 2, "rope=none"),
        # Attention and a state in every layer, and a factor on all keys.
        hybrid("falcon-h1", "Falcon-H1", "0-2", 3, "rope=default"),
    ],
)
def test_eight_bits_match_the_16_bit_cache(serve, family, layers, states):
    ours, plain = serve(family, "xquant", xquant=EIGHT), serve(family, "CPU_ATTN")
    kept = f"{states} state-space or linear layers keep their states as they are"
    assert f"layers {layers} are compressed; {kept}" in ours.log
    assert_close(ours.tasks[2]["logprobs"][0], plain.tasks[2]["logprobs"][0], 0.03)
    cold, warm, _ = ours.tasks
    assert warm["cached"] == [512]
    (cold,), (warm,) = cold["logits"][0], warm["logits"][0]
    assert max(abs(cold[token] - warm[token]) for token in cold.keys() & warm.keys()) <= 0.05
    # Two kv heads of 32 channels, keys and values: codes, scales and zeros, and the keys' outlier channel.
    check_capacity(ours, states * 2 * (32 + 32 + 8 + 2))
    check_capacity(plain, states * 2 * 2 * 32 * 4)
    assert ours.capacity > 2.5 * plain.capacity


def check_capacity(result, token_bytes):
    """Of as many layers with pages as with states, padded to pages, three of them for every sequence, vLLM says.

    ``token_bytes``: of a token in all layers with pages.
    """
    tokens = block_size(result)
    blocks = ENGINE["kv_cache_memory_bytes"] // (tokens * token_bytes)
    print(f"blocks of {tokens} tokens; capacity {result.capacity}")
    assert result.capacity == int(blocks / (math.ceil(LONGEST / tokens) + 3) * LONGEST)
