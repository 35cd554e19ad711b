"""vLLM with the Triton kernels in Triton's interpreter: metadata, mixed batches and the workspace, without a GPU.

The kernels are the same that a GPU runs; the interpreter takes them through the whole way of a token, slowly.
"""

import pytest

from tests.e2e.engine_process import NUM_LOGITS
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.e2e

PROMPT = [(7 * i * i + 3 * i + 5) % 300 + 3 for i in range(40)]
TRITON = {"XQUANT_ATTENTION_KERNELS": "triton", "TRITON_INTERPRET": "1"}
# C++ kernels that round no more than the interpreted ones do.
FP32 = {"XQUANT_ATTENTION_KERNELS": "portable"}
ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 16 << 20,
    # The long prompt takes several chunks, which prefill beside sequences that decode.
    "max_num_batched_tokens": 32,
    "max_num_seqs": 4,
    "block_size": 16,
    "max_logprobs": NUM_LOGITS,
    "logprobs_mode": "raw_logits",
}
TASKS = [{"kind": "next_logits", "prompts": [PROMPT[:5], PROMPT], "max_tokens": 2}]
WARM_UP = {"kind": "warm_up"}
SETTINGS = {"bits": 4, "cache": "latent"}


@pytest.mark.nightly
def test_same_logits(engines, tmp_path):
    """In most runs gpu_worker/test_gpu_worker.py asks as much, of the other model runner and of graphs."""
    model = save_tiny_model(tmp_path, "llama")
    expected = engines.run(model, "xquant", TASKS, xquant=SETTINGS, environment=FP32, **ENGINE)
    actual = engines.run(model, "xquant", [WARM_UP, *TASKS], xquant=SETTINGS, environment=TRITON, **ENGINE)
    assert actual.tasks[0] == 5
    assert "attention runs on the Triton kernels" in actual.log
    assert actual.cache_tokens == expected.cache_tokens
    for ours, theirs in zip(actual.tasks[1]["logits"], expected.tasks[0]["logits"], strict=True):
        assert_same(ours, theirs)


HOT_TASKS = [
    {"kind": "next_logits", "prompts": [PROMPT[:5], PROMPT], "max_tokens": 3},
    {"kind": "next_logits", "prompts": [PROMPT, PROMPT[20:]], "max_tokens": 2},
    {"kind": "hot_counts"},
]


@pytest.mark.parametrize(
    ("method", "hot", "some_cold"),
    [
        ({"method": "xquant-cl"}, 80 * 2 * 3 * 2 * 32 * 4, True),
        ({}, "50%", False),
        ({"cache": "x"}, "50%", False),
    ],
    ids=["chain, pool of 80 tokens", "latents", "X"],
)
@pytest.mark.nightly
def test_hot_blocks(engines, tmp_path, method, hot, some_cold):
    """With a pool, attended by FlashAttention's twin, the answers are those without; the prefix hit is promoted."""
    model = save_tiny_model(tmp_path, "llama")
    settings = {"bits": 16, **method}
    cold = engines.run(model, "xquant", HOT_TASKS[:2], xquant={**settings, "hot": 0}, environment=TRITON, **ENGINE)
    tasks = [*HOT_TASKS, WARM_UP]
    actual = engines.run(model, "xquant", tasks, xquant={**settings, "hot": hot}, environment=TRITON, **ENGINE)
    assert actual.cache_tokens < cold.cache_tokens
    assert actual.tasks[1]["cached"] == cold.tasks[1]["cached"]
    assert actual.tasks[1]["cached"][0] == 32
    counts = actual.tasks[2]
    assert counts["hot"] > 0
    assert bool(counts["cold"]) == some_cold
    assert actual.tasks[3] == 5
    for ours, theirs in zip(actual.tasks[:2], cold.tasks, strict=True):
        for x, y in zip(ours["logits"], theirs["logits"], strict=True):
            assert_same(x, y)


def assert_same(actual, expected):
    """One prompt's logits of every step; kernels differ in the order of additions (5e-6), seldom in a code (0.04)."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[token] - theirs[token]) for token in theirs) < 0.08
