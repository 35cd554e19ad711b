"""Model families, recognized by structure: tiny random checkpoints against vLLM's own 16-bit path."""

import os
import statistics

import pytest

from tests.e2e.engine import EngineFailed
from tests.tiny_models import quantize_tiny_model, save_tiny_model

pytestmark = pytest.mark.e2e

PROMPT = [(7 * i * i + 3 * i + 5) % 300 + 3 for i in range(200)]
TASKS = [{"kind": "prompt_logprobs", "prompts": [PROMPT]}]
ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_batched_tokens": 96,
    "max_num_seqs": 8,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lambda family, **changes: save_tiny_model(tmp_path_factory.mktemp(family), family, **changes)


@pytest.fixture(scope="module")
def logprobs(engines):
    def logprobs(folder, backend, **settings):
        result = engines.run(folder, backend, TASKS, **{**ENGINE, **settings})
        return result.tasks[0]["logprobs"][0]

    return logprobs


def assert_close(ours, expected, bound):
    error = statistics.mean(abs(p - q) for p, q in zip(ours, expected, strict=True))
    print(f"mean absolute change of log-probability {error:.4f}")
    assert error <= bound


@pytest.mark.parametrize("family", ["llama-bias", "mistral-window", "qwen2", "qwen3", "mqa"])
def test_eight_bits_match_the_16_bit_cache(logprobs, model, family):
    folder = model(family)
    assert_close(logprobs(folder, "xquant", xquant={"bits": 8}), logprobs(folder, "CPU_ATTN"), 0.02)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 8, "basis": "joint"}, {"bits": 8, "rotate": False, "outlier_channels": 0, "group_size": 16}],
    ids=["joint", "plain"],
)
def test_settings_on_qwen3(logprobs, model, settings):
    folder = model("qwen3")
    assert_close(logprobs(folder, "xquant", xquant=settings), logprobs(folder, "CPU_ATTN"), 0.02)


def test_pages_of_two_sizes_in_one_cache(engines, logprobs, model):
    folder = model("qwen3")
    settings = {"bits": {"key": 8, "value": 4}, "first_layers": 2, "first_layers_bits": 8}
    ours = engines.run(folder, "xquant", TASKS, xquant=settings, **ENGINE)
    # 2 kv heads of 80 channels, one group each: codes, scales and zeros, and the keys' outlier channel.
    eight, mixed = 2 * (80 + 80 + 8 + 2), 2 * (80 + 40 + 8 + 2)
    block = 128
    blocks = ENGINE["kv_cache_memory_bytes"] // (block * (2 * eight + mixed))
    assert ours.cache_tokens == blocks * block
    assert_close(ours.tasks[0]["logprobs"][0], logprobs(folder, "CPU_ATTN"), 0.1)


def test_the_reference_serves_where_no_kernels_were_built(engines, logprobs, model):
    folder = model("qwen3")
    environment = {"XQUANT_ATTENTION_KERNELS": "reference"}
    slow = engines.run(folder, "xquant", TASKS, xquant={"bits": 8}, environment=environment, **ENGINE)
    assert "attention runs on the PyTorch reference" in slow.log
    assert_close(slow.tasks[0]["logprobs"][0], logprobs(folder, "xquant", xquant={"bits": 8}), 0.01)


def test_float16(logprobs, model):
    folder = model("qwen2")
    ours = logprobs(folder, "xquant", dtype="float16", xquant={"bits": 8})
    assert_close(ours, logprobs(folder, "CPU_ATTN"), 0.03)


def test_multimodal_rope_is_refused_by_name(logprobs, model):
    folder = model("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]})
    with pytest.raises(EngineFailed, match="uses MRotaryEmbedding, a kind of RoPE that is not supported"):
        logprobs(folder, "xquant", xquant={"bits": 8})


def test_a_quantized_checkpoint_is_probed_for_its_effective_weight(engines, logprobs, model):
    folder = quantize_tiny_model(model("llama-bias"))
    ours = engines.run(folder, "xquant", TASKS, xquant={"bits": 8}, **{**ENGINE, "dtype": "bfloat16"})
    assert "3 quantized qkv_proj layers now hold their effective weight" in ours.log
    assert_close(ours.tasks[0]["logprobs"][0], logprobs(folder, "CPU_ATTN", dtype="bfloat16"), 0.1)


def test_tensor_parallel_ranks_factorize_their_own_heads(engines, logprobs, model):
    folder = model("qwen3")
    cores = sorted(os.sched_getaffinity(0))[:2]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    ours = engines.run(
        folder, "xquant", TASKS, xquant={"bits": 8}, environment=binding, tensor_parallel_size=2, **ENGINE
    )
    alone = engines.run(folder, "xquant", TASKS, xquant={"bits": 8}, **ENGINE)
    # Each rank holds one of the two kv heads: half the bytes per token.
    assert ours.cache_tokens == pytest.approx(2 * alone.cache_tokens, rel=0.01)
    assert_close(ours.tasks[0]["logprobs"][0], logprobs(folder, "CPU_ATTN"), 0.02)


def test_ngram_speculation_changes_no_token(engines, model):
    folder = model("qwen2")
    tasks = [{"kind": "greedy", "prompts": [PROMPT[:40] * 3], "max_tokens": 40}]
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    plain = engines.run(folder, "xquant", tasks, xquant={"bits": 8}, **ENGINE)
    drafted = engines.run(folder, "xquant", tasks, xquant={"bits": 8}, speculative_config=speculative, **ENGINE)
    assert drafted.tasks[0]["tokens"] == plain.tasks[0]["tokens"]


def test_new_weights_for_a_running_model_are_refused(engines, model):
    tasks = [{"kind": "reload_weights"}]
    result = engines.run(model("llama-bias"), "xquant", tasks, **ENGINE)
    assert "new weights cannot be loaded into a running model" in result.tasks[0]["error"]
