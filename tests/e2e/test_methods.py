"""Pages of the layer input and chains of deltas (XQuant-CL) on a real multi-head model.

It is SmolLM2 with its kv heads repeated: the same function with keys and values of 9 heads instead of 3, so the layer
input has half the channels of its keys and values.
"""

import math
import re

import pytest

from tests.e2e.engine import DEFAULTS
from tests.e2e.engine_process import NUM_LOGITS
from xquant_vllm.scheme.hot_share import DEFAULT_SHARE

pytestmark = pytest.mark.e2e

X, CHAIN = ("method=xquant", "cache=x"), ("method=xquant-cl", "cache=x")
LAYERS, HIDDEN, GROUP = 30, 576, 96
X_BYTES = {bits: HIDDEN * bits // 8 + 4 * HIDDEN // GROUP for bits in (2, 3, 4)}
PLAIN_BYTES = 2 * 2 * HIDDEN * LAYERS
FIRST_LAYERS = 3


@pytest.fixture(scope="module")
def perplexity(engines, smollm2_mha, documentation):
    """Perplexity of a fixed text, every attended token read back quantized, and the tokens that the cache holds."""

    def perplexity(backend: str, xquant: dict | None = None) -> tuple[float, int]:
        tasks = [{"kind": "prompt_logprobs", "prompts": [documentation[:400]]}]
        # What pages hold is measured: no pool beside them, whose products are in the model's dtype.
        xquant = None if xquant is None else {**xquant, "hot": 0}
        result = engines.run(smollm2_mha, backend, tasks, xquant=xquant, dtype="float32")
        logprobs = result.tasks[0]["logprobs"][0]
        return math.exp(-sum(logprobs) / len(logprobs)), result.cache_tokens

    return perplexity


@pytest.fixture(scope="module")
def exact(perplexity):
    return perplexity("CPU_ATTN")[0]


def fitting(bytes_per_token: int, block_size: int = 128) -> int:
    """Tokens in the cache's memory."""
    return DEFAULTS["kv_cache_memory_bytes"] // (block_size * bytes_per_token) * block_size


def chain_bytes(bits: int) -> int:
    """Bytes per token of XQuant-CL, as docs/design/pages.md says."""
    return FIRST_LAYERS * X_BYTES[4] + (LAYERS - FIRST_LAYERS) * X_BYTES[bits]


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize(("bits", "least"), [(4, 7.0), (3, 9.2), (2, 12.0)])
def test_capacity_is_what_the_formula_says(engines, smollm2_mha, perplexity, bits, least):
    plain = engines.run(smollm2_mha, "CPU_ATTN", [], dtype="bfloat16").cache_tokens
    chain = perplexity("xquant", {"method": "xquant-cl", "bits": bits})[1]
    assert plain == fitting(PLAIN_BYTES)
    assert chain == fitting(chain_bytes(bits))
    print(f"{bits} bits: {chain} / {plain} tokens, {chain / plain:.2f}x; bytes {PLAIN_BYTES / chain_bytes(bits):.2f}x")
    assert chain / plain >= least


def test_capacity_with_the_default_pool(engines, smollm2_mha):
    """What users get: the pool is taken off, by vLLM's own count."""
    plain = engines.run(smollm2_mha, "CPU_ATTN", [], dtype="bfloat16").capacity
    chain = engines.run(smollm2_mha, "xquant", [], xquant={"method": "xquant-cl", "bits": 2}, dtype="bfloat16")
    print(f"{chain.capacity} / {plain} tokens, {chain.capacity / plain:.2f}x")
    assert chain.capacity / plain >= 10
    assert f"KV cache size: {chain.capacity:,} tokens" in chain.log
    assert f"pages hold {chain.capacity:,} tokens, 10.11x of what 16 bit would hold in all of it" in chain.log
    (hot,) = re.findall(r"keep the keys and values of up to ([\d,]+) tokens in use", chain.log)
    assert int(hot.replace(",", "")) == int(DEFAULTS["kv_cache_memory_bytes"] * DEFAULT_SHARE) // PLAIN_BYTES


@pytest.mark.alike(keep=1)
# Measured: 15.13 without quantization; X 15.78, 18.05, 81; chain 15.16, 15.60, 18.8.
@pytest.mark.covers("Llama", *X, *CHAIN, "bits=4", "bits=3", "bits=2")
@pytest.mark.parametrize(("bits", "x_most", "chain_most"), [(4, 1.10, 1.03), (3, 1.40, 1.10), (2, 12.0, 1.50)])
def test_a_chain_is_closer_than_each_layer_by_itself(perplexity, exact, bits, x_most, chain_most):
    x = perplexity("xquant", {"bits": bits})[0]
    chain = perplexity("xquant", {"method": "xquant-cl", "bits": bits})[0]
    print(f"{bits} bits: perplexity {exact:.2f}, X {x:.2f}, chain {chain:.2f}")
    assert chain < x
    assert x <= exact * x_most
    assert chain <= exact * chain_most


def test_more_bits_are_closer(perplexity, exact):
    chains = [perplexity("xquant", {"method": "xquant-cl", "bits": bits})[0] for bits in (4, 3, 2)]
    assert exact * 0.99 <= chains[0] < chains[1] < chains[2]


@pytest.mark.covers("Llama", *CHAIN, "bits=3")
def test_pages_of_three_sizes_in_one_cache(perplexity, exact):
    """First layers, anchors, deltas and layers that are not quantized: the allocator counts each one's bytes."""
    settings = {
        "method": "xquant-cl",
        "bits": 3,
        "first_layers": 2,
        "anchor_interval": 10,
        "first_layers_bits": 8,
        "anchor_bits": 4,
        "skip_layers": [0, 29],
    }
    value, tokens = perplexity("xquant", settings)
    by_layer = [X_BYTES[3]] * LAYERS
    by_layer[1] = HIDDEN + 4 * HIDDEN // GROUP
    by_layer[11] = by_layer[21] = X_BYTES[4]
    by_layer[0] = by_layer[29] = 2 * HIDDEN
    assert tokens == fitting(sum(by_layer))
    assert value <= exact * 1.06


@pytest.mark.covers("Llama", *CHAIN, "prefix caching", "chunked prefill", "bits=2")
def test_logits_do_not_depend_on_scheduling(engines, smollm2_mha, documentation):
    """Deltas are taken against what is in the pages: cold, warm and in chunks the same codes are written.

    Of pages alone. With a pool, whether a row is attended from it depends on scheduling: see test_hot_blocks.py.
    """
    tasks = [{"kind": "next_logits", "prompts": [documentation[700:1000]], "max_tokens": 3}] * 2
    settings = {
        "xquant": {"method": "xquant-cl", "bits": 2, "hot": 0},
        "dtype": "float32",
        "logprobs_mode": "raw_logits",
        "max_logprobs": NUM_LOGITS,
    }
    whole = engines.run(smollm2_mha, "xquant", tasks, **settings).tasks
    cut = engines.run(smollm2_mha, "xquant", tasks, max_num_batched_tokens=64, max_num_seqs=8, **settings).tasks
    assert whole[1]["cached"][0] >= 256
    for other in (whole[1], *cut):
        assert other["tokens"] == whole[0]["tokens"]
        for ours, theirs in zip(other["logits"][0], whole[0]["logits"][0], strict=True):
            shared = ours.keys() & theirs.keys()
            assert len(shared) >= 0.8 * NUM_LOGITS
            assert max(abs(ours[token] - theirs[token]) for token in shared) <= 0.05
