"""Start-up refusals, raised by vLLM's own configuration of a real engine."""

import json
import os
import pickle
from contextlib import nullcontext

import pytest
import torch
import transformers
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import quantize_tiny_model, save_paligemma, save_tiny_model
from xquant_vllm import __version__
from xquant_vllm.errors import SettingsError, UnsupportedError
from xquant_vllm.offline.factorize import factorize
from xquant_vllm.offline.factorize_options import FactorizeOptions
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
    # vLLM 0.33 wants the same of both.
    configure(tiny, dtype="bfloat16" if dtype == "auto" else dtype, kv_cache_dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"additional_config": {"xquant": {"bits": 6}}}, ["'bits'", "6", "set 8, 4, 3 or 2"]),
        ({"additional_config": {"xquant": {"bitz": 4}}}, ["unknown setting 'bitz'", "did you mean 'bits'?"]),
        ({"additional_config": {"xquant": {"group_size": 24}}}, ["'group_size'", "24", "does not divide the 32"]),
        ({"additional_config": {"xquant": {"first_layers": 9}}}, ["'first_layers'", "9", "has 3 layers"]),
        ({"additional_config": {"xquant": {"skip_layers": [1, 3]}}}, ["'skip_layers'", "[1, 3]", "layers up to 2"]),
        ({"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype fp8", "leave it out", "bits"]),
        ({"block_size": 8}, ["--block-size 8", "multiple of 16"]),
        (
            {"enable_lora": True, "additional_config": {"xquant": {"cache": "x"}}},
            ["--enable-lora", 'set "cache": "latent"'],
        ),
        ({"weight_transfer_config": {"backend": "sparse_nccl"}}, ["--weight-transfer-config", "nccl, ipc"]),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            ["the KV connector ExampleConnector", "XQuantConnector", "--kv-transfer-config"],
        ),
        ({"kv_offloading_size": 0.1}, ["--kv-offloading-size 0.1", "not supported on CPUs", "leave it out"]),
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
    "Mamba: state-space or linear attention": ("MambaForCausalLM", transformers.MambaConfig()),
    "Bloom: ALiBi": ("BloomForCausalLM", transformers.BloomConfig(hidden_size=64)),
    "Falcon: ALiBi": ("FalconForCausalLM", transformers.FalconConfig(**_SHAPE, alibi=True)),
    "Qwen2 with `mrope_section`: multimodal RoPE": (
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
    "Llama 4: attention within chunks of the sequence": (
        "Llama4ForCausalLM",
        transformers.Llama4TextConfig(**_SHAPE, head_dim=32, attention_chunk_size=64, no_rope_layers=[1, 0]),
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


@pytest.mark.parametrize(
    ("chunk", "ropes", "refused"), [(64, [1, 0], True), (64, [0, 0], False), (None, [1, 1], False)]
)
def test_llama_4_without_chunks_is_not_refused_for_them(tmp_path, chunk, ropes, refused):
    """vLLM gives chunks to layers with RoPE alone."""
    config = transformers.Llama4TextConfig(**_SHAPE, head_dim=32, attention_chunk_size=chunk, no_rope_layers=ropes)
    config.architectures, config.dtype = ["Llama4ForCausalLM"], "float32"
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="attention_chunk_size") if refused else nullcontext():
        configure(str(tmp_path), max_model_len=256)


def test_an_error_is_said_in_the_log_and_not_wrapped(tiny, caplog):
    """Pydantic, which runs the check, would put lines of its own behind it."""
    with pytest.raises(SettingsError) as error:
        configure(tiny, additional_config={"xquant": {"bits": 6}})
    assert type(error.value) is SettingsError
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said == [str(error.value)]


@pytest.mark.parametrize("backend", ["xquant", "kivi"])
def test_a_checkpoint_that_asks_for_a_cache_of_its_own_is_told_how_to_be_served(tmp_path, backend):
    quantize_tiny_model(save_tiny_model(tmp_path, "llama"))
    config = json.loads((tmp_path / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = r"asks for a cache in a format of its own \(kv_cache_scheme .*; set --kv-cache-dtype bfloat16$"
    for arguments in ({}, {"kv_cache_dtype": "fp8"}):
        with pytest.raises(UnsupportedError, match=named):
            configure(str(tmp_path), attention_backend=backend, **arguments)
    configure(str(tmp_path), attention_backend=backend, kv_cache_dtype="bfloat16")


@pytest.mark.parametrize("backend", ["xquant", "kivi"])
def test_models_whose_images_see_themselves_are_served_without_images(tmp_path, backend):
    save_paligemma(tmp_path)
    named = r"PaliGemmaForConditionalGeneration .* serve its text part with --language-model-only, or choose another"
    with pytest.raises(UnsupportedError, match=named):
        configure(str(tmp_path), attention_backend=backend, dtype="float32", max_model_len=256)
    configure(str(tmp_path), attention_backend=backend, dtype="float32", max_model_len=256, language_model_only=True)


@pytest.mark.parametrize("fault", [lambda path: path.write_bytes(b""), lambda path: (path.unlink(), os.mkfifo(path))])
@pytest.mark.parametrize("named", [{}, {"attention_backend": None, "attention_config": {"backend": "XQUANT"}}])
def test_factors_are_looked_at_before_vllm_reads_the_folder(tmp_path, fault, named):
    """To find the model's dtype it reads all safetensors files: it fails at an empty one, and waits for a pipe."""
    factorize(FactorizeOptions(save_tiny_model(tmp_path / "model", "llama"), tmp_path / "out", dtype="bfloat16"))
    fault(tmp_path / "out" / "xquant_factors.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "out" / "config.json").unlink()  # a link to the other folder's
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=r"xquant_factors\.safetensors is .*make it anew with"):
        configure(str(tmp_path / "out"), **named)
