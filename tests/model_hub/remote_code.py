"""Models that vLLM has classes for and transformers has not: a Llama or a Qwen2 under their names of weights.

Their own configuration classes come with the checkpoints; vLLM reads what it needs from any.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.model_hub.family import HubFamily, change_config

_KV_HEADS, _HEAD_SIZE = 2, 32
Weights = dict[str, torch.Tensor]


def _rewrite(change: Callable[[Weights], Weights], **settings: Any) -> Callable[[Path], None]:
    """Change a checkpoint's tensors, and settings in its config.json."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
        save_file(weights, path, metadata={"format": "pt"})
        change_config(folder, **settings)

    return edit


def _renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    """Every name with the first pattern that matches it replaced."""
    found = {}
    for name, tensor in weights.items():
        pattern = next(pattern for pattern in names if re.search(pattern, name))
        found[re.sub(pattern, names[pattern], name)] = tensor
    return found


def _fused(weights: Weights, fuse: Callable[..., torch.Tensor], parts: tuple[str, ...], name: str) -> Weights:
    """The tensors whose names differ by ``parts`` as one of another name."""
    found = {of: tensor for of, tensor in weights.items() if not any(part in of for part in parts)}
    for of in weights:
        if parts[0] in of:
            found[of.replace(parts[0], name)] = fuse(*(weights[of.replace(parts[0], part)] for part in parts))
    return found


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _by_kv_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The queries of a kv head, its key and its value, head by head."""
    heads = [part.view(_KV_HEADS, -1, _HEAD_SIZE, part.shape[-1]) for part in (query, key, value)]
    return torch.cat(heads, 1).reshape(-1, query.shape[-1])


def _internlm2(weights: Weights) -> Weights:
    names = {
        r"self_attn\.o_proj": "attention.wo",
        r"mlp\.gate_proj": "feed_forward.w1",
        r"mlp\.up_proj": "feed_forward.w3",
        r"mlp\.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "^lm_head": "output",
        r"attention\.wqkv|^model\.norm": r"\g<0>",
    }
    return _renamed(_fused(weights, _by_kv_head, _QKV, "attention.wqkv"), names)


def _exaone(weights: Weights) -> Weights:
    names = {
        r"^model\.layers\.(\d+)\.self_attn\.o_proj": r"transformer.h.\1.attn.attention.out_proj",
        r"^model\.layers\.(\d+)\.self_attn": r"transformer.h.\1.attn.attention",
        r"^model\.layers\.(\d+)\.mlp\.gate_proj": r"transformer.h.\1.mlp.c_fc_0",
        r"^model\.layers\.(\d+)\.mlp\.up_proj": r"transformer.h.\1.mlp.c_fc_1",
        r"^model\.layers\.(\d+)\.mlp\.down_proj": r"transformer.h.\1.mlp.c_proj",
        r"^model\.layers\.(\d+)\.input_layernorm": r"transformer.h.\1.ln_1",
        r"^model\.layers\.(\d+)\.post_attention_layernorm": r"transformer.h.\1.ln_2",
        r"^model\.embed_tokens": "transformer.wte",
        r"^model\.norm": "transformer.ln_f",
        "^lm_head": "lm_head",
    }
    return _renamed(weights, names)


def _orion(weights: Weights) -> Weights:
    """With LayerNorms in place of RMS norms."""
    generator = torch.Generator().manual_seed(1)
    biases = {
        f"{name.removesuffix('weight')}bias": torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in weights.items()
        if name.endswith("norm.weight")
    }
    return weights | biases


def _chatglm(weights: Weights) -> Weights:
    stacked = _fused(weights, lambda *parts: torch.cat(parts), _QKV, "self_attention.query_key_value")
    stacked = _fused(stacked, lambda *parts: torch.cat(parts), ("mlp.gate_proj", "mlp.up_proj"), "mlp.dense_h_to_4h")
    names = {
        r"^model\.layers\.(\d+)\.self_attn\.o_proj": r"transformer.encoder.layers.\1.self_attention.dense",
        r"^model\.layers\.(\d+)\.mlp\.down_proj": r"transformer.encoder.layers.\1.mlp.dense_4h_to_h",
        r"^model\.layers": "transformer.encoder.layers",
        r"^model\.norm": "transformer.encoder.final_layernorm",
        r"^model\.embed_tokens": "transformer.embedding.word_embeddings",
        "^lm_head": "transformer.output_layer",
    }
    without = {name: tensor for name, tensor in stacked.items() if not name.endswith("o_proj.bias")}
    return _renamed(without, names)


def _same(weights: Weights) -> Weights:
    return weights


REMOTE_CODE = (
    HubFamily("InternLM3", ("internlm/internlm3-8b-instruct",), "InternLM3ForCausalLM", "LlamaConfig",
              {"head_dim": 32}, made_as="LlamaForCausalLM"),
    HubFamily("InternLM2", ("internlm/internlm2_5-7b-chat", "internlm/internlm2-chat-20b"), "InternLM2ForCausalLM",
              "LlamaConfig", made_as="LlamaForCausalLM", edit=_rewrite(_internlm2, bias=False)),
    HubFamily("EXAONE 3", ("LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct", "LGAI-EXAONE/EXAONE-Deep-7.8B"),
              "ExaoneForCausalLM", "LlamaConfig", made_as="LlamaForCausalLM",
              edit=_rewrite(_exaone, layer_norm_epsilon=1e-5, activation_function="silu")),
    HubFamily("Orion", ("OrionStarAI/Orion-14B-Chat",), "OrionForCausalLM", "LlamaConfig",
              made_as="LlamaForCausalLM", edit=_rewrite(_orion)),
    HubFamily("MiniCPM", ("openbmb/MiniCPM-2B-sft-bf16", "openbmb/MiniCPM4-8B"), "MiniCPMForCausalLM", "LlamaConfig",
              made_as="LlamaForCausalLM",
              edit=_rewrite(_same, scale_emb=2, scale_depth=1.4, dim_model_base=64, num_experts=0)),
    HubFamily("MiMo", ("XiaomiMiMo/MiMo-7B-RL",), "MiMoForCausalLM", "Qwen2Config", made_as="Qwen2ForCausalLM"),
    HubFamily("Solar Pro", ("upstage/solar-pro-preview-instruct",), "SolarForCausalLM", "LlamaConfig",
              made_as="LlamaForCausalLM",
              edit=_rewrite(_same, bskcn_1=[1], bskcn_2=[1], bskcn_3=[2], bskcn_4=[2], bskcn_tv=[0.9, 0.8])),
    HubFamily("ChatGLM", ("zai-org/chatglm3-6b", "zai-org/glm-4-9b-chat"), "ChatGLMModel", "LlamaConfig",
              {"attention_bias": True}, made_as="LlamaForCausalLM",
              edit=_rewrite(_chatglm, model_type="chatglm", num_layers=3, padded_vocab_size=320, ffn_hidden_size=192,
                            kv_channels=_HEAD_SIZE, seq_length=1024, layernorm_epsilon=1e-6, rmsnorm=True,
                            multi_query_attention=True, multi_query_group_num=_KV_HEADS, add_bias_linear=False,
                            add_qkv_bias=True, original_rope=True)),
)  # fmt: skip
