"""What a plan reads of configurations and headers, and what it says of models that are not supported."""

import json

import pytest

from tests.planning.models import LLAMA, config_folder, write_header
from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import RefusedError
from xquant_vllm.planning.model_files import read_model
from xquant_vllm.planning.planned_model import planned_model


def planned(folder):
    return planned_model(read_model(str(folder)))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({}, (256, 4, 2, 64, 4)),
        ({"head_dim": 32}, (256, 4, 2, 32, 4)),
        ({"num_key_value_heads": None}, (256, 4, 4, 64, 4)),
        ({"num_key_value_heads": None, "multi_query": True}, (256, 4, 1, 64, 4)),
        (
            {
                **dict.fromkeys(LLAMA, None),
                "architectures": ["GPT2LMHeadModel"],
                "n_embd": 128,
                "n_head": 4,
                "n_layer": 3,
                "n_positions": 64,
            },
            (128, 4, 4, 32, 3),
        ),
        ({**dict.fromkeys(LLAMA, None), "text_config": {**LLAMA, "num_hidden_layers": 2}}, (256, 4, 2, 64, 2)),
    ],
)
def test_sizes(tmp_path, config, sizes):
    model = planned(config_folder(tmp_path, **config))
    assert (model.hidden_size, model.heads, model.kv_heads, model.head_size, model.layers) == sizes


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"sliding_window": 64}, (64,) * 4),
        ({"sliding_window": 64, "use_sliding_window": False}, (None,) * 4),
        ({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}, (64, None) * 2),
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, (None,)),
        ({"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4}, (None,)),
    ],
)
def test_windows(tmp_path, config, windows):
    assert planned(config_folder(tmp_path, **config)).windows == windows


def test_transformers_is_asked_where_layers_alternate_and_are_not_named(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "gemma2")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    expected = tuple(48 if kind == "sliding_attention" else None for kind in config.pop("layer_types"))
    path.write_text(json.dumps(config))
    assert planned(folder).windows == expected
    assert None in expected
    assert 48 in expected


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, "multi-head latent attention"),
        ({"is_encoder_decoder": True}, "cross attention"),
        ({"alibi": True}, "ALiBi"),
        ({"architectures": ["BloomForCausalLM"]}, "ALiBi"),
        ({"model_type": "mamba"}, "state-space"),
        ({"num_kv_shared_layers": 2}, "layers that share a cache"),
        ({"layer_types": ["chunked_attention"] * 4, "attention_chunk_size": 128}, "attention within chunks"),
        ({"head_dim": 64, "v_head_dim": 32}, "value heads of another size"),
        ({"head_dim": 60}, "heads of 60 channels cannot be packed"),
        ({"head_dim": 512}, "more than 256"),
        ({"clip_qkv": 8.0}, "clamped"),
    ],
)
def test_problems(tmp_path, config, problem):
    (found,) = planned(config_folder(tmp_path, **config)).problems
    assert problem in found


def test_headers_tell_norms_bytes_and_structure(tmp_path):
    names = {"model.layers.0.self_attn.k_proj.weight": (128, 256), "model.layers.0.self_attn.k_norm.weight": (128,)}
    model = planned(config_folder(tmp_path, tensors=names))
    assert model.keys_normed_together
    assert model.calibratable
    assert model.weight_bytes == 2 * (128 * 256 + 128)
    write_header(tmp_path / "model.safetensors", {"model.layers.0.self_attn.k_norm.weight": (64,)})
    model = planned(tmp_path)
    assert not model.keys_normed_together
    assert not model.calibratable


def test_without_files_a_note_says_so(tmp_path):
    model = planned(config_folder(tmp_path))
    assert model.weight_bytes is None
    assert "no safetensors files" in model.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or no safetensors file"),
        (b"\xff" * 16, "a header of"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "no table of tensors"),
        (b"\x0c\x00\x00\x00\x00\x00\x00\x00" + b'{"a": {"b":1', "truncated or no safetensors file"),
    ],
)
def test_damaged_headers_are_one_clear_error(tmp_path, content, message):
    config_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(RefusedError, match=message):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [("[]", "no table of settings"), ("{", "config.json cannot be read"), ("{}", "has no hidden_size in config.json")],
)
def test_damaged_configurations_are_one_clear_error(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RefusedError, match=message):
        planned(tmp_path)


def test_an_index_without_files_is_one_clear_error(tmp_path):
    config_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(RefusedError, match="has no weight_map"):
        read_model(str(tmp_path))
