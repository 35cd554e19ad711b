"""Start-up refusals, raised by vLLM's own configuration of a real engine."""

import pickle

import pytest
import torch
import transformers
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import save_tiny_model
from xquant_vllm import __version__
from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.checks import unsupported_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama"))


CHAIN = {"method": "xquant-cl", "first_layers": 1}


def configure(model: str, **arguments):
    arguments = {"attention_backend": "xquant", "skip_tokenizer_init": True, "max_model_len": 512, **arguments}
    return EngineArgs(model=model, **arguments).create_engine_config()


@pytest.mark.parametrize("spelling", ["xquant", "XQUANT", "XQuant"])
def test_any_spelling_selects_the_backend(tiny, spelling):
    assert configure(tiny, attention_backend=spelling).attention_config.backend.name == "XQUANT"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_cache_dtypes_that_change_nothing_are_accepted(tiny, dtype):
    configure(tiny, kv_cache_dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"additional_config": {"xquant": {"bits": 6}}}, ["'bits'", "6", "set 8, 4, 3 or 2"]),
        ({"additional_config": {"xquant": {"bitz": 4}}}, ["unknown setting 'bitz'", "did you mean 'bits'?"]),
        ({"additional_config": {"xquant": {"group_size": 24}}}, ["'group_size'", "24", "does not divide the 32"]),
        ({"additional_config": {"xquant": {"first_layers": 9}}}, ["'first_layers'", "9", "has 3 layers"]),
        ({"additional_config": {"xquant": {"skip_layers": [1, 3]}}}, ["'skip_layers'", "[1, 3]", "layers up to 2"]),
        (
            {"additional_config": {"xquant": CHAIN}, "pipeline_parallel_size": 2},
            ["'method': 'xquant-cl'", "--pipeline-parallel-size 2", 'set "method": "xquant"'],
        ),
        ({"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype fp8", "leave it out", "bits"]),
        ({"block_size": 8}, ["--block-size 8", "multiple of 16"]),
        ({"enable_lora": True}, ["--enable-lora", "merge the adapter"]),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            ["KV connectors", "leave them out"],
        ),
        ({"load_format": "ipc_cache"}, ["ipc_cache", "use auto"]),
    ],
)
def test_refusals_name_the_cause_and_the_remedy(tiny, arguments, parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - vLLM wraps it in a pydantic error; the parts are checked
        configure(tiny, **arguments)
    for part in parts:
        assert part in str(error.value)


def test_a_chain_over_layers_with_block_tables_of_their_own_is_refused(tmp_path):
    gemma3 = str(save_tiny_model(tmp_path, "gemma3"))
    with pytest.raises(ValueError, match=r"kinds of layers \(full_attention, sliding_attention\) have block tables of"):
        configure(gemma3, dtype="bfloat16", additional_config={"xquant": CHAIN})
    configure(gemma3, dtype="bfloat16", additional_config={"xquant": {"method": "xquant"}})


_SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
# As MiMo-V2 is: these layers choose a backend for values of another size themselves.
_MIMO = {"head_dim": 32, "v_head_dim": 16, "swa_head_dim": 32, "swa_v_head_dim": 32}
_REFUSED = {
    "DeepSeek-V2: multi-head latent attention": ("DeepseekV2ForCausalLM", transformers.DeepseekV2Config()),
    "DeepSeek-V3: multi-head latent attention": ("DeepseekV3ForCausalLM", transformers.DeepseekV3Config()),
    "Whisper: cross attention": ("WhisperForConditionalGeneration", transformers.WhisperConfig(d_model=64)),
    # vLLM has no BART of its own and would take its stand-in for models of transformers.
    "BART: cross attention": ("TransformersForCausalLM", transformers.BartConfig(d_model=64)),
    "Falcon-H1: state-space or linear attention": ("FalconH1ForCausalLM", transformers.FalconH1Config()),
    "Mamba: state-space or linear attention": ("MambaForCausalLM", transformers.MambaConfig()),
    "Qwen3-Next: state-space or linear attention": ("Qwen3NextForCausalLM", transformers.Qwen3NextConfig()),
    "Bloom: ALiBi": ("BloomForCausalLM", transformers.BloomConfig(hidden_size=64)),
    "Falcon: ALiBi": ("FalconForCausalLM", transformers.FalconConfig(**_SHAPE, alibi=True)),
    "Qwen2 with `mrope_section` (Qwen2-VL): multimodal RoPE": (
        "Qwen2ForCausalLM",
        transformers.Qwen2Config(**_SHAPE, rope_parameters=_MROPE),
    ),
    "MiMo-V2: value heads of another size": (
        "MiMoV2FlashForCausalLM",
        transformers.MiMoV2FlashConfig(**_SHAPE, **_MIMO),
    ),
    "MiMo-V2, sliding layers: value heads of another size": (
        "MiMoV2FlashForCausalLM",
        transformers.MiMoV2FlashConfig(**_SHAPE, **_MIMO | {"v_head_dim": 32, "swa_v_head_dim": 16}),
    ),
    "openPangu: learned sink tokens": (
        "PanguProMoEV2ForCausalLM",
        transformers.LlamaConfig(**_SHAPE, param_sink_number=8),
    ),
}


@pytest.mark.parametrize(
    ("feature", "architecture", "config"),
    [
        pytest.param(name.partition(": ")[2], *values, id=name, marks=pytest.mark.covers(name, "refused"))
        for name, values in _REFUSED.items()
    ],
)
def test_models_are_refused_by_name_and_feature_before_weights_are_loaded(tmp_path, feature, architecture, config):
    config.architectures = [architecture.replace("Transformers", "Bart")]
    config.dtype = "float32"
    config.save_pretrained(tmp_path)
    refusal = (
        rf"{architecture} \(.*\) uses .*{feature}.*not supported; choose another --attention-backend for this model"
    )
    with pytest.raises(ValueError, match=refusal):
        configure(str(tmp_path), max_model_len=256)


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        ({"alibi_slopes": [0.5] * 4}, "uses ALiBi"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "a layer that shares the cache of model.layers.0"),
        (
            {"sinks": torch.zeros(2)},
            r"attention sinks of shape \[2\], not a number for each",
        ),
        (
            {"sinks": torch.zeros(4, 1)},
            r"attention sinks of shape \[4, 1\], not a number for each",
        ),
        # As MiMo-V2's vision layers ask for.
        ({"sinks": torch.zeros(4), "sinks_bias_key0": True}, "asks its attention for sinks_bias_key0"),
        ({"sinks": torch.zeros(4), "chunk_lookback": 2}, "asks its attention for chunk_lookback"),
    ],
)
def test_what_only_a_layer_tells_is_refused_when_it_is_built(tiny, arguments, refusal):
    from xquant_vllm.plugin.backend.impl import XQuantImpl

    named = f"LlamaForCausalLM .*{refusal}.* not supported; choose another --attention-backend for this model"
    with set_current_vllm_config(configure(tiny)), pytest.raises(UnsupportedError, match=named):
        XQuantImpl(4, 32, 1.0, 2, **arguments)


def test_the_error_survives_the_way_between_processes():
    error = unsupported_model("a model")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_other_backends_are_left_alone(tiny):
    config = configure(tiny, attention_backend="CPU_ATTN", additional_config={"xquant": {"bits": 6}}, block_size=32)
    assert config.attention_config.backend.name == "CPU_ATTN"


def test_the_compile_cache_key_covers_the_version_and_the_settings(tiny):
    default, four = configure(tiny), configure(tiny, additional_config={"xquant": {"bits": 4}})
    assert default.additional_config["xquant_version"] == four.additional_config["xquant_version"] == __version__
    plain = configure(tiny, attention_backend="CPU_ATTN")
    assert "xquant_version" not in plain.additional_config
    assert len({config.compute_hash() for config in (default, four, plain)}) == 3
