"""Tiny random checkpoints of architectures that vLLM knows and transformers does not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_LAYERS, _HIDDEN, _INNER, _VOCABULARY, _HEADS, _KV_HEADS = 3, 128, 192, 320, 4, 2
_QKV = (_HEADS + 2 * _KV_HEADS) * (_HIDDEN // _HEADS)
_COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "dtype": "float32"}

_INTERNLM2_CODE = """
from transformers import PreTrainedConfig


class InternLM2Config(PreTrainedConfig):
    model_type = "internlm2"
"""


def _internlm2() -> tuple[dict[str, Any], Iterator[tuple[str, list[int]]]]:
    config = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bias": False,
    }

    def tensors() -> Iterator[tuple[str, list[int]]]:
        yield "model.tok_embeddings.weight", [_VOCABULARY, _HIDDEN]
        for layer in range(_LAYERS):
            stem = f"model.layers.{layer}"
            yield f"{stem}.attention.wqkv.weight", [_QKV, _HIDDEN]
            yield f"{stem}.attention.wo.weight", [_HIDDEN, _HIDDEN]
            yield f"{stem}.feed_forward.w1.weight", [_INNER, _HIDDEN]
            yield f"{stem}.feed_forward.w3.weight", [_INNER, _HIDDEN]
            yield f"{stem}.feed_forward.w2.weight", [_HIDDEN, _INNER]
            yield f"{stem}.attention_norm.weight", [_HIDDEN]
            yield f"{stem}.ffn_norm.weight", [_HIDDEN]
        yield "model.norm.weight", [_HIDDEN]
        yield "output.weight", [_VOCABULARY, _HIDDEN]

    return config, tensors()


def _chatglm() -> tuple[dict[str, Any], Iterator[tuple[str, list[int]]]]:
    config = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "hidden_size": _HIDDEN,
        "ffn_hidden_size": _INNER,
        "kv_channels": _HIDDEN // _HEADS,
        "num_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "multi_query_attention": True,
        "multi_query_group_num": _KV_HEADS,
        "padded_vocab_size": _VOCABULARY,
        "seq_length": 1024,
        "add_qkv_bias": True,
        "original_rope": True,
    }

    def tensors() -> Iterator[tuple[str, list[int]]]:
        yield "transformer.embedding.word_embeddings.weight", [_VOCABULARY, _HIDDEN]
        for layer in range(_LAYERS):
            stem = f"transformer.encoder.layers.{layer}"
            yield f"{stem}.self_attention.query_key_value.weight", [_QKV, _HIDDEN]
            yield f"{stem}.self_attention.query_key_value.bias", [_QKV]
            yield f"{stem}.self_attention.dense.weight", [_HIDDEN, _HIDDEN]
            yield f"{stem}.mlp.dense_h_to_4h.weight", [2 * _INNER, _HIDDEN]
            yield f"{stem}.mlp.dense_4h_to_h.weight", [_HIDDEN, _INNER]
            yield f"{stem}.input_layernorm.weight", [_HIDDEN]
            yield f"{stem}.post_attention_layernorm.weight", [_HIDDEN]
        yield "transformer.encoder.final_layernorm.weight", [_HIDDEN]
        yield "transformer.output_layer.weight", [_VOCABULARY, _HIDDEN]

    return config, tensors()


OWN_CODE = {"internlm2": _internlm2, "chatglm": _chatglm}


def save_own_code_model(folder: Path, family: str) -> Path:
    """Write a checkpoint; it is served with ``trust_remote_code``.

    Args:
        folder: where to write.
        family: a key of ``OWN_CODE``.

    Returns:
        ``folder``.
    """
    config, tensors = OWN_CODE[family]()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in tensors:
        norm, deviation = name.endswith("norm.weight"), 0.5 if name.endswith("bias") else 0.12
        weights[name] = torch.ones(shape) if norm else torch.randn(shape, generator=generator) * deviation
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**_COMMON, **config}))
    if "auto_map" in config:
        (folder / "configuration_internlm2.py").write_text(_INTERNLM2_CODE)
    return folder
