"""Model families, recognized by structure: tiny random checkpoints against vLLM's own 16-bit path.

What a test covers is marked, and makes up the table in docs/families.md: see tests/family_coverage.py.
"""

import os
import shutil
import statistics

import pytest
from demo import can_compile

from tests.e2e.engine import EngineFailed
from tests.e2e.engine_process import NUM_LOGITS
from tests.family_coverage import LATENTS
from tests.tiny_models import quantize_tiny_model, remove_sinks, save_tiny_model

pytestmark = pytest.mark.e2e

PROMPT = [(7 * i * i + 3 * i + 5) % 300 + 3 for i in range(200)]
ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    # The prompt takes three chunks, and more than one block: prefix caching hits some of them.
    "max_num_batched_tokens": 96,
    "max_num_seqs": 8,
    "block_size": 32,
    "max_logprobs": NUM_LOGITS,
}
# Tiny models have few hidden channels, so that most would cache the layer input by themselves.
EIGHT = {"bits": 8, "cache": "latent"}
GEMMA3_KEPT = {"backend_per_kind": {"sliding_window": "CPU_ATTN"}}


def tasks_of(length):
    """Cold, warm, and the log-probabilities of the prompt itself."""
    logits = {"kind": "next_logits", "prompts": [PROMPT[:length]]}
    return [logits, logits, {"kind": "prompt_logprobs", "prompts": [PROMPT[:length]]}]


TASKS = tasks_of(len(PROMPT))


@pytest.fixture(scope="module")
def serve(engines, tiny):
    """Serve a family in the process that these tests share."""

    def serve(family, backend, tasks=TASKS, **settings):
        return engines.run(tiny(family), backend, tasks, **{**ENGINE, **settings})

    return serve


@pytest.fixture(scope="module")
def logprobs(serve):
    def logprobs(family, backend, tasks=TASKS, **settings):
        return serve(family, backend, tasks, **settings).tasks[-1]["logprobs"][0]

    return logprobs


def difference(ours, expected):
    """Mean absolute difference of log-probabilities."""
    return statistics.mean(abs(p - q) for p, q in zip(ours, expected, strict=True))


def assert_close(ours, expected, bound):
    error = difference(ours, expected)
    print(f"mean absolute change of log-probability {error:.4f}")
    assert error <= bound


def assert_far(one, other):
    distance = difference(one, other)
    print(f"mean absolute difference of log-probability to another model {distance:.4f}")
    assert distance > 0.5


def covering(family, name, *features):
    """A family as a parameter of a test, with what the test then covers."""
    return pytest.param(family, id=family, marks=pytest.mark.covers(name, *features, *LATENTS, "bits=8"))


SERVED = [
    covering("llama-bias", "Llama", "bias", "rope=default"),
    covering("mqa", "Llama", "rope=default"),
    covering("mha", "Llama", "rope=default"),
    covering("mistral-window", "Mistral", "sliding window", "rope=default"),
    covering("qwen2", "Qwen2", "bias", "rope=default"),
    covering("qwen3", "Qwen3", "qk-norm", "rope=default"),
    covering("gemma3", "Gemma 3", "qk-norm", "sliding window", "rope=default", "rope=linear"),
    covering("phi3", "Phi-3", "rope=default"),
    covering("phi3-longrope", "Phi-3", "rope=partial", "rope=longrope"),
    covering("opt", "OPT", "bias", "rope=none"),
    covering("gpt-oss", "GPT-OSS", "attention sinks", "bias", "sliding window", "rope=yarn"),
    covering("granite-swa", "Granite with sliding windows", "attention sinks", "bias", "sliding window", "rope=none"),
]


@pytest.mark.alike(keep=3)
@pytest.mark.parametrize("family", SERVED)
def test_eight_bits_match_the_16_bit_cache(logprobs, family):
    assert_close(logprobs(family, "xquant", xquant=EIGHT), logprobs(family, "CPU_ATTN"), 0.03)


def caching(method, cache, family, name, *features):
    marks = pytest.mark.covers(name, *features, f"method={method}", f"cache={cache}", "bits=8")
    return pytest.param(method, cache, family, id=f"{method}-{cache}-{family}", marks=marks)


@pytest.mark.alike(keep=3)
@pytest.mark.parametrize(
    ("method", "cache", "family"),
    [
        caching("xquant", "x", "mha", "Llama", "rope=default"),
        caching("xquant", "x", "llama-bias", "Llama", "bias"),
        caching("xquant", "x", "qwen3", "Qwen3", "qk-norm"),
        caching("xquant", "x", "gemma3", "Gemma 3", "qk-norm", "sliding window"),
        caching("xquant", "x", "phi3", "Phi-3", "rope=default"),
        caching("xquant", "x", "phi3-longrope", "Phi-3", "rope=longrope"),
        caching("xquant", "x", "opt", "OPT", "bias", "rope=none"),
        caching("xquant", "x", "gpt-oss", "GPT-OSS", "attention sinks", "bias", "sliding window", "rope=yarn"),
        caching("xquant-cl", "x", "mha", "Llama", "rope=default"),
        caching("xquant-cl", "x", "phi3-longrope", "Phi-3", "rope=longrope"),
        caching("xquant-cl", "x", "opt", "OPT", "bias", "rope=none"),
        caching("xquant-cl", "latent", "mistral-window", "Mistral", "sliding window"),
        caching("xquant-cl", "latent", "qwen2", "Qwen2", "bias"),
        caching("xquant-cl", "latent", "qwen3", "Qwen3", "qk-norm"),
    ],
)
def test_layer_inputs_and_chains_match_the_16_bit_cache(serve, logprobs, method, cache, family):
    # Of pages alone: with a pool the last bits depend on what else is in the batch.
    settings = {"bits": 8, "method": method, "cache": cache, "hot": 0}
    if method == "xquant-cl":
        settings["first_layers"] = 1
    ours = serve(family, "xquant", xquant=settings)
    assert f'cache "{cache}" at key 8 / value 8 bits, method "{method}"' in ours.log
    assert ("hold differences of" in ours.log) == (method == "xquant-cl")
    assert_close(ours.tasks[-1]["logprobs"][0], logprobs(family, "CPU_ATTN"), 0.06)
    cold, warm, _ = ours.tasks
    assert warm["cached"] == [192]
    assert warm["logits"] == cold["logits"]


@pytest.mark.alike(keep=2)
@pytest.mark.parametrize(
    ("family", "cache"), [("mha", "x"), ("phi3", "x"), ("opt", "x"), ("llama-bias", "latent"), ("mqa", "latent")]
)
def test_what_is_cached_is_what_has_fewer_channels(serve, family, cache):
    assert f'cache "{cache}" at key 4 / value 4 bits' in serve(family, "xquant", []).log


def also_covering(parameter, *features):
    (mark,) = parameter.marks
    return covering(*parameter.values, mark.args[0], *features)


@pytest.mark.alike(keep=3)
@pytest.mark.parametrize("family", [also_covering(p, "prefix caching", "chunked prefill") for p in SERVED])
def test_a_cached_prefix_gives_the_same_logits(serve, family):
    """The rest of the prompt, prefilled behind a cached prefix, is another chunk than without one."""
    cold, warm, _ = serve(family, "xquant", xquant=EIGHT).tasks
    assert cold["cached"] == [0]
    # Past the sliding window, where there is one: the blocks before it are gone, and not needed.
    assert warm["cached"] == [192]
    (cold,), (warm,) = cold["logits"][0], warm["logits"][0]
    largest = max(abs(cold[token] - warm[token]) for token in cold.keys() & warm.keys())
    print(f"largest difference of a logit: {largest:.2e}")
    assert largest <= 0.05


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize(
    "family",
    [
        covering("llama-llama3", "Llama", "rope=llama3"),
        covering("llama-yarn", "Llama", "rope=yarn"),
        covering("llama-linear", "Llama", "rope=linear"),
        covering("llama-dynamic", "Llama", "rope=dynamic"),
        covering("llama-partial", "Llama", "rope=partial"),
    ],
)
def test_rope_variants(logprobs, family):
    ours, expected = logprobs(family, "xquant", xquant=EIGHT), logprobs(family, "CPU_ATTN")
    assert_close(ours, expected, 0.03)
    # The same weights with plain RoPE are another model, which the bound must tell apart.
    assert_far(expected, logprobs("llama", "CPU_ATTN"))


@pytest.mark.alike(keep=1)
@pytest.mark.skipif(
    not can_compile(),
    reason="torch.compile needs Python.h, which python3-dev installs: vLLM itself cannot compile here",
)
@pytest.mark.parametrize(
    ("method", "cache", "family"),
    [
        caching("xquant-cl", "x", "phi3-longrope", "Phi-3", "torch.compile"),
        caching("xquant", "latent", "gemma3", "Gemma 3", "torch.compile"),
    ],
)
def test_compiled_equals_eager(engines, tiny, logprobs, method, cache, family):
    engine = {**ENGINE, "enforce_eager": False}
    settings = {"bits": 8, "method": method, "cache": cache, "hot": 0}
    compiled = engines.run(tiny(family), "xquant", TASKS, xquant=settings, **engine).tasks[-1]["logprobs"][0]
    # Measured 0.0001: the model rounds differently, and flips a code now and then.
    assert_close(compiled, logprobs(family, "xquant", xquant=settings), 0.002)


@pytest.mark.covers("Phi-3", "rope=partial", "rope=longrope", *LATENTS, "bits=8")
def test_longrope_of_short_contexts(logprobs):
    """Up to ``original_max_position_embeddings`` the short factors serve, beyond it the long ones."""
    short = {"tasks": tasks_of(120), "max_model_len": 128}
    ours, expected = (
        logprobs("phi3-longrope", "xquant", xquant=EIGHT, **short),
        logprobs("phi3-longrope", "CPU_ATTN", **short),
    )
    assert_close(ours, expected, 0.03)
    assert_far(expected, logprobs("phi3-longrope", "CPU_ATTN")[:119])


def test_sequences_longer_than_the_rotary_table_are_refused_by_name(logprobs):
    with pytest.raises(EngineFailed) as error:
        logprobs("llama-dynamic", "xquant", xquant=EIGHT, max_model_len=512)
    for part in ("LlamaAttention at model.layers.0", "knows 256 positions", "512", "set --max-model-len 256 or less"):
        assert part in error.value.log


def sinks(family, name, *features):
    marks = pytest.mark.covers(name, "attention sinks", "bias", "sliding window", *features)
    return pytest.param(family, id=family, marks=marks)


WITH_SINKS = [
    sinks("gpt-oss", "GPT-OSS", "rope=yarn"),
    # Keys with a bias and without RoPE: a bias moves all scores alike, but not the sink.
    sinks("granite-swa", "Granite with sliding windows", "rope=default", "rope=none"),
]


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize("settings", [{"cache": "latent"}, {"cache": "x"}, {"cache": "latent", "prompt": "exact"}])
@pytest.mark.parametrize("family", WITH_SINKS)
def test_attention_sinks_are_those_of_the_16_bit_cache(logprobs, tiny, engines, tmp_path, family, settings):
    ours, expected = (
        logprobs(family, "xquant", xquant={"bits": 16, **settings}),
        logprobs(family, "CPU_ATTN"),
    )
    # Measured 0.0005: a page of 16 bits holds half-precision numbers of a model in FP32.
    assert_close(ours, expected, 0.002)
    without = remove_sinks(shutil.copytree(tiny(family), tmp_path / "without"))
    tasks = engines.run(without, "CPU_ATTN", TASKS, **ENGINE).tasks
    assert_far(expected, tasks[-1]["logprobs"][0])


@pytest.mark.covers("GPT-OSS", "attention sinks", *LATENTS, "bits=4")
def test_four_bits_under_attention_sinks(logprobs):
    ours = logprobs("gpt-oss", "xquant", xquant={"bits": 4, "cache": "latent"})
    # Measured 0.23; without its sinks the model is 0.78 away.
    assert_close(ours, logprobs("gpt-oss", "CPU_ATTN"), 0.35)


@pytest.mark.covers("GPT-OSS", "attention sinks", "method=xquant-cl", "cache=latent", "bits=8")
def test_a_chain_of_layers_with_attention_sinks(logprobs):
    # Layers of both kinds then have one block table, which a chain needs.
    one_table = {"disable_hybrid_kv_cache_manager": True}
    ours = logprobs("gpt-oss", "xquant", xquant={**EIGHT, "method": "xquant-cl"}, **one_table)
    assert_close(ours, logprobs("gpt-oss", "CPU_ATTN"), 0.06)


@pytest.mark.covers("GPT-OSS", "attention sinks", "tensor parallel", *LATENTS)
@pytest.mark.nightly
def test_tensor_parallel_ranks_have_the_sinks_of_their_own_heads(engines, logprobs, tiny):
    cores = sorted(os.sched_getaffinity(0))[:2]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    plain = {"bits": 16, "cache": "latent"}
    ours = engines.run(
        tiny("gpt-oss"), "xquant", TASKS, xquant=plain, environment=binding, tensor_parallel_size=2, **ENGINE
    )
    assert_close(ours.tasks[-1]["logprobs"][0], logprobs("gpt-oss", "CPU_ATTN"), 0.002)


def test_kivi_refuses_attention_sinks_by_name(serve):
    refused = "kivi: GptOssForCausalLM .* attention sinks not supported .* choose another --attention-backend for this"
    with pytest.raises(EngineFailed, match=refused):
        serve("gpt-oss", "kivi", block_size=128)


@pytest.mark.covers("Gemma 3", "sliding window", "mixed with 16 bit", *LATENTS, "bits=8")
def test_sliding_layers_that_keep_keys_and_values(serve, logprobs):
    long = {"max_model_len": 1024}
    all_compressed = serve("gemma3", "xquant", xquant=EIGHT, **long)
    mixed = serve("gemma3", "xquant", xquant=EIGHT, attention_config=GEMMA3_KEPT, **long)
    plain = serve("gemma3", "CPU_ATTN", **long)
    assert "layers 0-5 are compressed, which is all" in all_compressed.log
    assert "layers 2, 5 are compressed; layers 0-1, 3-4 keep keys and values (CPU_ATTN)" in mixed.log
    assert plain.tasks[1]["cached"] == mixed.tasks[1]["cached"] == [192]
    errors = [difference(run.tasks[2]["logprobs"][0], plain.tasks[2]["logprobs"][0]) for run in (mixed, all_compressed)]
    print(f"mean absolute change of log-probability: mixed {errors[0]:.4f}, all compressed {errors[1]:.4f}")
    assert errors[0] < errors[1] <= 0.03
    # vLLM pads all pages to the largest: if blocks were not made longer to fill them, nothing would be gained.
    print(f"capacities {plain.capacity}, {mixed.capacity}, {all_compressed.capacity}")
    assert 1.5 * plain.capacity < mixed.capacity < all_compressed.capacity


@pytest.mark.covers("Gemma 3", "sliding window", "mixed with 16 bit", *LATENTS, "bits=8")
def test_full_layers_that_keep_keys_and_values(serve):
    kept = {"backend_per_kind": {"full_attention": "CPU_ATTN"}}
    mixed = serve("gemma3", "xquant", xquant=EIGHT, attention_config=kept)
    assert "layers 0-1, 3-4 are compressed; layers 2, 5 keep keys and values (CPU_ATTN)" in mixed.log
    assert_close(mixed.tasks[2]["logprobs"][0], serve("gemma3", "CPU_ATTN").tasks[2]["logprobs"][0], 0.03)


@pytest.mark.alike(keep=1)
@pytest.mark.covers("Qwen3", "qk-norm", *LATENTS, "bits=8")
@pytest.mark.parametrize(
    "settings",
    [{**EIGHT, "basis": "joint"}, {**EIGHT, "rotate": False, "outlier_channels": 0, "group_size": 16}],
    ids=["joint", "plain"],
)
def test_settings_on_qwen3(logprobs, settings):
    assert_close(logprobs("qwen3", "xquant", xquant=settings), logprobs("qwen3", "CPU_ATTN"), 0.02)


@pytest.mark.covers("Qwen3", *LATENTS, "bits=8", "bits=4")
def test_pages_of_two_sizes_in_one_cache(serve, logprobs):
    settings = {"cache": "latent", "bits": {"key": 8, "value": 4}, "first_layers": 2, "first_layers_bits": 8}
    ours = serve("qwen3", "xquant", xquant=settings)
    # 2 kv heads of 80 channels, one group each: codes, scales and zeros, and the keys' outlier channel.
    eight, mixed = 2 * (80 + 80 + 8 + 2), 2 * (80 + 40 + 8 + 2)
    block = ENGINE["block_size"]
    blocks = ENGINE["kv_cache_memory_bytes"] // (block * (2 * eight + mixed))
    assert ours.cache_tokens == blocks * block
    assert_close(ours.tasks[-1]["logprobs"][0], logprobs("qwen3", "CPU_ATTN"), 0.1)


def folded_layers(result):
    """How many of a tiny model's layers have the up-projection of their values in `o_proj`, as the log says."""
    return int(result.log.partition(" of 3 layers the up-projection of values is folded")[0].rpartition(" ")[2])


@pytest.mark.alike(keep=2)
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_values_folded_into_the_output_projection_change_nothing(serve, family):
    """But for the order of products: without quantization no code can change. OPT's values have a bias."""
    plain = {"bits": 16, "cache": "latent"}
    ours = serve(family, "xquant", xquant=plain)
    apart = serve(family, "xquant", xquant={**plain, "fold_values": False})
    assert folded_layers(ours) == (0 if family == "opt" else 3)
    assert "is folded into the output projection" not in apart.log
    assert_close(ours.tasks[-1]["logprobs"][0], apart.tasks[-1]["logprobs"][0], 1e-3)


@pytest.mark.nightly
def test_the_reference_serves_where_no_kernels_were_built(engines, logprobs, tiny):
    environment = {"XQUANT_ATTENTION_KERNELS": "reference"}
    slow = engines.run(tiny("qwen3"), "xquant", TASKS, xquant=EIGHT, environment=environment, **ENGINE)
    assert "attention runs on the PyTorch reference" in slow.log
    assert_close(slow.tasks[-1]["logprobs"][0], logprobs("qwen3", "xquant", xquant=EIGHT), 0.01)


def test_float16(logprobs):
    ours = logprobs("qwen2", "xquant", dtype="float16", xquant=EIGHT)
    assert_close(ours, logprobs("qwen2", "CPU_ATTN"), 0.03)


def test_a_quantized_checkpoint_is_probed_for_its_effective_weight(engines, tmp_path):
    folder = quantize_tiny_model(save_tiny_model(tmp_path, "llama-bias"))
    engine = {**ENGINE, "dtype": "bfloat16"}
    ours = engines.run(folder, "xquant", TASKS, xquant=EIGHT, **engine)
    expected = engines.run(folder, "CPU_ATTN", TASKS, **engine)
    assert "3 quantized qkv_proj layers now hold their effective weight" in ours.log
    assert folded_layers(ours) == 0
    assert_close(ours.tasks[-1]["logprobs"][0], expected.tasks[-1]["logprobs"][0], 0.1)


@pytest.mark.covers("Qwen3", "tensor parallel", *LATENTS, "bits=8")
def test_tensor_parallel_ranks_factorize_their_own_heads(engines, serve, logprobs, tiny):
    cores = sorted(os.sched_getaffinity(0))[:2]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    ours = engines.run(
        tiny("qwen3"), "xquant", TASKS, xquant=EIGHT, environment=binding, tensor_parallel_size=2, **ENGINE
    )
    alone = serve("qwen3", "xquant", xquant=EIGHT)
    # Each rank holds one of the two kv heads: half the bytes per token.
    assert ours.cache_tokens == pytest.approx(2 * alone.cache_tokens, rel=0.01)
    assert folded_layers(ours) == folded_layers(alone) == 3
    assert_close(ours.tasks[-1]["logprobs"][0], logprobs("qwen3", "CPU_ATTN"), 0.02)


@pytest.mark.nightly
def test_tensor_parallel_ranks_of_a_multi_head_model_cache_latents(engines, serve, logprobs, tiny):
    """X is as wide on every rank, latents are shared out: with two ranks both take the same, and latents are faster."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    ours = engines.run(
        tiny("mha"), "xquant", TASKS, xquant={"bits": 8}, environment=binding, tensor_parallel_size=2, **ENGINE
    )
    assert 'cache "latent" at key 8 / value 8 bits' in ours.log
    assert "with --tensor-parallel-size 2 a rank has latents of 128 channels; the layer input has 128" in ours.log
    assert 'cache "x" at key 8 / value 8 bits' in serve("mha", "xquant", [], xquant={"bits": 8}).log
    assert_close(ours.tasks[-1]["logprobs"][0], logprobs("mha", "CPU_ATTN"), 0.03)


def test_ngram_speculation_changes_no_token(engines, serve, tiny):
    tasks = [{"kind": "greedy", "prompts": [PROMPT[:40] * 3], "max_tokens": 40}]
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    plain = serve("qwen2", "xquant", tasks, xquant=EIGHT)
    engine = {**ENGINE, "speculative_config": speculative}
    drafted = engines.run(tiny("qwen2"), "xquant", tasks, xquant=EIGHT, **engine)
    assert drafted.tasks[0]["tokens"] == plain.tasks[0]["tokens"]
