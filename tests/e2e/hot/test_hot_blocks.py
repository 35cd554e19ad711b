"""A pool of hot blocks changes no answer of a trained model.

What vLLM does with blocks (chunks, preemption, drafts, pools that are too small) is in the traces of test_coherence.py.

Pages hold 16-bit numbers here: at 4 bits a difference in the last bit of a product now and then makes another code, and
every such code makes more of them. In FP32 with 16-bit pages the largest difference of a log-probability was seen to be
0.002; a wrong slot, position or layer moves them by several units.
"""

import pytest

pytestmark = pytest.mark.e2e

TOLERANCE = 0.02
X = {"bits": 16, "cache": "x"}
CHAIN_OF_X = {"bits": 16, "method": "xquant-cl"}
CHAIN_OF_LATENTS = {"bits": 16, "method": "xquant-cl", "cache": "latent"}
LATENTS = {"bits": 16}


@pytest.fixture(scope="module")
def run(engines):
    """Answers of an engine, with a pool of so many bytes."""

    def run(model, tasks, xquant, hot, **engine):
        engine = {"dtype": "float32", "max_model_len": 512, **engine}
        return engines.run(model, "xquant", tasks, xquant={**xquant, "hot": hot}, **engine)

    return run


@pytest.fixture(scope="module")
def tasks(documentation):
    """Prompts scored and continued together, then again from the prefix cache, then others of every length."""
    long, short = documentation[:300], documentation[700:760]
    return [
        {"kind": "prompt_logprobs", "prompts": [long, short]},
        {"kind": "greedy", "prompts": [short, long], "max_tokens": 40},
        {"kind": "greedy", "prompts": [long, documentation[:200] + short, short[:1]], "max_tokens": 8},
    ]


def assert_same(actual, expected):
    for ours, theirs in zip(actual.tasks, expected.tasks, strict=True):
        if "logprobs" in ours:
            pairs = [
                pair
                for x, y in zip(ours["logprobs"], theirs["logprobs"], strict=True)
                for pair in zip(x, y, strict=True)
            ]
            largest = max(abs(x - y) for x, y in pairs)
            print(f"largest difference of a log-probability: {largest:.1e}")
            assert largest <= TOLERANCE
        if "tokens" in ours:
            assert ours["tokens"] == theirs["tokens"]
            assert ours["cached"] == theirs["cached"]


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize("xquant", [X, CHAIN_OF_X, LATENTS], ids=["X", "chain of X", "latents"])
def test_hot_equals_cold(run, smollm2_mha, tasks, xquant):
    cold, hot = (run(smollm2_mha, tasks, xquant, hot) for hot in (0, "50%"))
    assert "of the cache keep the keys and values" in hot.log
    assert "of the cache keep the keys and values" not in cold.log
    assert hot.cache_tokens <= 0.51 * cold.cache_tokens
    assert_same(hot, cold)


def test_chain_of_latents(run, smollm2, tasks):
    cold, hot = (run(smollm2, tasks, CHAIN_OF_LATENTS, hot) for hot in (0, "50%"))
    assert_same(hot, cold)


@pytest.mark.nightly
def test_sliding_windows(run, gemma3):
    """Longer than the window of 512: its layers have let go of the first blocks."""
    prompt = list(range(1000, 1700))
    tasks = [{"kind": "prompt_logprobs", "prompts": [prompt]}, {"kind": "greedy", "prompts": [prompt], "max_tokens": 8}]
    cold, hot = (run(gemma3, tasks, LATENTS, hot, block_size=64, max_model_len=1024) for hot in (0, "50%"))
    assert_same(hot, cold)


def test_in_bfloat16(run, smollm2_mha, documentation):
    """In the model's own dtype: within what its rounding does, which for a 16-bit cache is 0.04 from FP32."""
    tasks = [{"kind": "prompt_logprobs", "prompts": [documentation[:200]]}]
    cold, hot = (run(smollm2_mha, tasks, X, hot, dtype="bfloat16") for hot in (0, "50%"))
    ours, theirs = (result.tasks[0]["logprobs"][0] for result in (hot, cold))
    assert sum(abs(x - y) for x, y in zip(ours, theirs, strict=True)) / len(ours) < 0.08


def test_a_pool_smaller_than_a_sequence_is_warned_of(run, smollm2_mha, documentation):
    tasks = [{"kind": "greedy", "prompts": [documentation[:300]], "max_tokens": 4}]
    settings = {"max_model_len": 512, "block_size": 32}
    cold, hot = (run(smollm2_mha, tasks, X, hot, **settings) for hot in (0, "16MiB"))
    assert "fewer than one sequence of --max-model-len 512" in hot.log
    assert_same(hot, cold)


def test_no_memory_left_for_pages(run, smollm2_mha):
    with pytest.raises(AssertionError, match="setting 'hot': 1073741824 cannot work"):
        run(smollm2_mha, [], X, 1 << 30)
