"""Models that run through vLLM's Transformers backend, against transformers or the 16-bit cache of the same backend.

Some have no class in vLLM, others are asked for it. Their attention modules are code of the transformers library.
"""

import pytest
from demo import can_compile

from tests.e2e.engine import EngineFailed
from tests.e2e.families.test_families import EIGHT, ENGINE, TASKS, assert_close, covering, folded_layers, tasks_of
from tests.e2e.families.test_projections import logprobs, transformers_logprobs, two_ranks
from tests.tiny_models import quantize_tiny_model, save_tiny_model

pytestmark = pytest.mark.e2e

# Asked for where vLLM has a class of its own.
HOSTED = {"model_impl": "transformers"}


@pytest.fixture(scope="module")
def serve(engines, tiny):
    def serve(family, backend, tasks=TASKS, **settings):
        run = engines.run(tiny(family), backend, tasks, **{**ENGINE, **settings})
        assert "Using Transformers modeling backend" in run.log
        return run

    return serve


@pytest.fixture(scope="module")
def expected(tiny):
    """Log-probabilities of the prompt by transformers, which takes no engine."""
    known = {}

    def expected(family):
        if family not in known:
            known[family] = transformers_logprobs(tiny(family))
        return known[family]

    return expected


SERVED = [
    covering("glm", "GLM-4 (`glm`)", "bias", "rope=partial"),
    covering("gpt-bigcode", "GPT-BigCode", "bias", "rope=none"),
    covering("gpt-neox", "GPT-NeoX", "bias", "rope=partial"),
    covering("hunyuan", "Hunyuan (dense)", "qk-norm", "rope=default"),
    covering("olmo2", "OLMo 2", "qk-norm", "rope=default"),
    covering("phi", "Phi-2", "bias", "rope=partial"),
    covering("smollm3", "SmolLM3", "rope=default", "rope=none"),
]
ALSO_SERVED = [
    covering("arcee", "Arcee", "rope=default"),
    covering("starcoder2", "StarCoder2", "bias", "sliding window", "rope=default"),
]


# Of values.
WITH_BIAS = ("glm", "gpt-bigcode", "gpt-neox", "phi", "starcoder2")


def assert_served(serve, expected, family):
    ours = serve(family, "xquant", xquant=EIGHT)
    assert "layers 0-2 are compressed, which is all" in ours.log
    assert_close(logprobs(ours), expected(family), 0.03)
    cold, warm, _ = ours.tasks
    assert warm["cached"] == [192]
    (cold,), (warm,) = cold["logits"][0], warm["logits"][0]
    assert max(abs(cold[token] - warm[token]) for token in cold.keys() & warm.keys()) <= 0.05
    # What has no bias is folded, whatever the output projection is called.
    assert folded_layers(ours) == (0 if family in WITH_BIAS else 3)


@pytest.mark.alike(keep=2)
@pytest.mark.parametrize("family", SERVED)
def test_models_without_a_class_in_vllm(serve, expected, family):
    assert_served(serve, expected, family)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ALSO_SERVED)
def test_more_models_without_a_class_in_vllm(serve, expected, family):
    assert_served(serve, expected, family)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt-oss", "phi3"])
def test_models_that_are_asked_to(serve, expected, family):
    """Norms of key heads, RoPE of two kinds, attention sinks, and a projection that the module's own code slices."""
    ours = serve(family, "xquant", xquant={"bits": 16, "cache": "latent"}, **HOSTED)
    assert_close(logprobs(ours), expected(family), 0.002)


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("gpt-neox", {"cache": "x"}, id="gpt-neox"),
        pytest.param("phi", {"cache": "x", "method": "xquant-cl"}, id="phi"),
        pytest.param("gpt-bigcode-mha", {"cache": "x"}, marks=pytest.mark.nightly, id="gpt-bigcode-mha"),
        pytest.param(
            "smollm3",
            {"cache": "latent", "method": "xquant-cl", "first_layers": 1},
            marks=pytest.mark.nightly,
            id="smollm3",
        ),
    ],
)
def test_layer_inputs_and_chains(serve, expected, family, settings):
    ours = serve(family, "xquant", xquant={"bits": 8, "hot": 0, **settings})
    assert f'cache "{settings["cache"]}" at key 8 / value 8 bits' in ours.log
    assert_close(logprobs(ours), expected(family), 0.06)


@pytest.mark.nightly
@pytest.mark.skipif(
    not can_compile(),
    reason="torch.compile needs Python.h, which python3-dev installs: vLLM itself cannot compile here",
)
@pytest.mark.parametrize("family", ["gpt-neox", "smollm3"])
def test_compiled_equals_eager(serve, family):
    settings = {**EIGHT, "hot": 0}
    compiled = serve(family, "xquant", xquant=settings, enforce_eager=False)
    assert_close(logprobs(compiled), logprobs(serve(family, "xquant", xquant=settings)), 0.002)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["smollm3", "olmo2"])
def test_tensor_parallel_ranks_factorize_their_own_heads(serve, expected, family):
    ours = serve(family, "xquant", xquant=EIGHT, **two_ranks())
    assert folded_layers(ours) == 3
    assert_close(logprobs(ours), expected(family), 0.03)


@pytest.mark.nightly
def test_a_quantized_checkpoint(engines, tmp_path):
    folder = quantize_tiny_model(save_tiny_model(tmp_path, "llama-bias"))
    engine = {**ENGINE, **HOSTED, "dtype": "bfloat16"}
    ours = engines.run(folder, "xquant", TASKS, xquant=EIGHT, **engine)
    assert "3 quantized qkv_proj layers now hold their effective weight" in ours.log
    assert_close(logprobs(ours), logprobs(engines.run(folder, "CPU_ATTN", TASKS, **engine)), 0.1)


@pytest.mark.nightly
def test_kivi(serve, expected):
    """With a residual as long as the prompt nothing is quantized yet."""
    kivi = {"bits": 4, "residual": 256}
    ours = serve("smollm3", "kivi", kivi=kivi, block_size=None)
    assert_close(logprobs(ours), expected("smollm3"), 0.03)


def test_kivi_refuses_keys_before_rope_by_name(serve):
    with pytest.raises(EngineFailed) as error:
        serve("smollm3", "kivi", kivi={"bits": 4, "residual": 256, "pre_rope": True}, block_size=None)
    assert "kivi: setting 'pre_rope': true cannot work on a model that runs through" in error.value.log
    assert "leave pre_rope out to cache keys after RoPE" in error.value.log


def test_adapters_are_refused_by_name(serve):
    with pytest.raises(EngineFailed) as error:
        serve("smollm3", "xquant", xquant=EIGHT, enable_lora=True)
    assert "--enable-lora is not supported with models that run through vLLM's Transformers" in error.value.log
    assert "merge the adapter into the checkpoint" in error.value.log


def test_angles_that_depend_on_the_longest_sequence_are_refused(serve):
    with pytest.raises(EngineFailed) as error:
        serve("phi3-longrope", "xquant", xquant=EIGHT, **HOSTED)
    for part in (
        "Phi3Attention at model.layers.0.self_attn turns positions by angles that change",
        "set --max-model-len to the length that the model was trained for",
        "set --model-impl vllm, which has code of its own for this model",
    ):
        assert part in error.value.log


@pytest.mark.nightly
def test_angles_that_no_sequence_changes_are_served(serve):
    short = {**HOSTED, "max_model_len": 128, "tasks": tasks_of(120)}
    ours = serve("phi3-longrope", "xquant", xquant=EIGHT, **short)
    assert_close(logprobs(ours), logprobs(serve("phi3-longrope", "CPU_ATTN", **short)), 0.03)


def test_clipped_values_are_refused_by_name(serve):
    with pytest.raises(EngineFailed) as error:
        serve("olmo-clip", "xquant", xquant=EIGHT)
    assert "OlmoAttention at model.layers.0.self_attn is not recognized" in error.value.log
    assert "they are clamped, scaled one by one, added to, or come from elsewhere" in error.value.log
    # vLLM has no class for it.
    assert "--model-impl" not in error.value.log
