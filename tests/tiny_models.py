"""Tiny random checkpoints of real architectures, made by transformers and saved like any model."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    # Large enough that attention matters and logits differ clearly.
    "initializer_range": 0.12,
}


def _llama_rope(
    rope_type: str, positions: int = 1024, model_max_length: int | None = None, **parameters: Any
) -> tuple[type, dict[str, Any]]:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **parameters}
    lengths = {"max_position_embeddings": positions, "model_max_length": model_max_length or positions}
    return transformers.LlamaConfig, {"rope_parameters": rope, **lengths}


_WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]

# Models of one shape have the same weights. Scaled RoPE tables have 256 rows (or more) and are made for 64 positions.
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-bias": (transformers.LlamaConfig, {"attention_bias": True}),
    "llama-llama3": _llama_rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    # Its table is longer than max_position_embeddings, as of checkpoints that name the original length there.
    "llama-yarn": _llama_rope(
        "yarn", positions=64, model_max_length=256, factor=4.0, original_max_position_embeddings=64
    ),
    "llama-linear": _llama_rope("linear", positions=128, factor=2.0),
    "llama-dynamic": _llama_rope("dynamic", positions=256, factor=2.0, max_trained_positions=64),
    "llama-partial": _llama_rope("default", partial_rotary_factor=0.5),
    "llama-mrope": _llama_rope("default", mrope_section=[4, 6, 6]),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 48, "head_dim": 32}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 80}),
    "mha": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "mqa": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    # Caps on scores and on logits.
    "gemma2": (
        transformers.Gemma2Config,
        {"sliding_window": 48, "head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "sliding_window": 48,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
            },
        },
    ),
    "phi3": (transformers.Phi3Config, {"num_key_value_heads": 4}),
    "phi3-gqa": (transformers.Phi3Config, {}),
    "phi3-longrope": (
        transformers.Phi3Config,
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.05 * i for i in range(12)],
                "long_factor": [1.0 + 0.4 * i for i in range(12)],
            },
        },
    ),
    "opt": (
        transformers.OPTConfig,
        {"num_key_value_heads": 4, "ffn_dim": 192, "word_embed_proj_dim": 128, "init_std": 0.12},
    ),
    # Attention sinks, biases, YaRN, and a sliding window in every other layer.
    "gpt-oss": (
        transformers.GptOssConfig,
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 48,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
    # Attention sinks and biases, with RoPE in some layers and without it in others.
    "granite-swa": (
        transformers.GraniteSWAConfig,
        {
            "attention_bias": True,
            "attention_multiplier": 32**-0.5,
            "sliding_window": 48,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "layer_rope_theta": [0.0, 1e4, 1e4],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    # Keys of all heads normalized together. All experts are asked: a last bit shall not choose others.
    "olmoe": (transformers.OlmoeConfig, {"num_key_value_heads": 4, "num_experts": 2, "num_experts_per_tok": 2}),
    "olmoe-gqa": (transformers.OlmoeConfig, {"num_experts": 2, "num_experts_per_tok": 2}),
    # A LayerNorm of every key head, with weights of its own, and RoPE whose pairs lie side by side.
    "command-r-plus": (
        transformers.CohereConfig,
        {"use_qk_norm": True, "logit_scale": 1.0, "tie_word_embeddings": True},
    ),
    # One norm for queries and keys, behind RoPE; neither in the last layer. Its attention is not in chunks.
    "llama4-whole": (
        transformers.Llama4TextConfig,
        {
            "head_dim": 32,
            "intermediate_size_mlp": 192,
            "attention_chunk_size": None,
            "layer_types": ["full_attention"] * 3,
            "no_rope_layers": [1, 1, 0],
            "moe_layers": [],
            "interleave_moe_layer_step": 0,
        },
    ),
    # Partial RoPE whose pairs lie side by side.
    "glm": (transformers.GlmConfig, {"head_dim": 32}),
    # Other names and layouts of projections.
    "gpt2": (transformers.GPT2Config, {"num_key_value_heads": 4}),
    "gptj": (transformers.GPTJConfig, {"num_key_value_heads": 4, "rotary_dim": 16}),
    "falcon": (transformers.FalconConfig, {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-mqa": (transformers.FalconConfig, {"num_kv_heads": 1, "multi_query": True, "bias": True}),
    # RoPE in some layers only, although all own a module for it.
    "cohere2": (
        transformers.Cohere2Config,
        {"sliding_window": 48, "tie_word_embeddings": True, "layer_types": _WINDOWS, "logit_scale": 1.0},
    ),
    "exaone4": (transformers.Exaone4Config, {"sliding_window": 48, "layer_types": _WINDOWS}),
    # Those that follow have no class in vLLM, whose Transformers backend serves them.
    "arcee": (transformers.ArceeConfig, {}),
    # RoPE in some layers and none in others.
    "smollm3": (transformers.SmolLM3Config, {"no_rope_layers": [1, 1, 0]}),
    "phi": (
        transformers.PhiConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "starcoder2": (transformers.Starcoder2Config, {"sliding_window": 48}),
    # Query, key and value of one head lie side by side.
    "gpt-neox": (transformers.GPTNeoXConfig, {"num_key_value_heads": 4}),
    "gpt-bigcode": (transformers.GPTBigCodeConfig, {"num_key_value_heads": 1}),
    "gpt-bigcode-mha": (transformers.GPTBigCodeConfig, {"num_key_value_heads": 4, "multi_query": False}),
    # Norms of keys over all heads together, and of every head behind RoPE.
    "olmo2": (transformers.Olmo2Config, {}),
    "hunyuan": (transformers.HunYuanDenseV1Config, {"head_dim": 32}),
    "olmo-clip": (transformers.OlmoConfig, {"clip_qkv": 0.5}),
}


def save_tiny_model(folder: Path, family: str, **changes: Any) -> Path:
    """Write a checkpoint.

    Args:
        folder: where to write.
        family: a key of ``FAMILIES``.
        changes: further settings of the model's configuration.

    Returns:
        ``folder``.
    """
    config_class, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**{**COMMON, **settings, **changes})
    return save_random_weights(folder, transformers.AutoModelForCausalLM.from_config(config))


def save_random_weights(folder: Path, model: transformers.PreTrainedModel) -> Path:
    """Write a model with random weights, in FP32.

    Args:
        folder: where to write.
        model: made from a configuration; what it begins with as zeros and ones is changed.

    Returns:
        ``folder``.
    """
    model = model.to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh biases are zero and fresh norms one, which would hide that they are forgotten.
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "gemma" in model.config.model_type and name.endswith("norm.weight"):
                parameter.uniform_(-0.5, 0.5)  # added to one
            elif re.search(r"\b(q|k|query|key)_(layer)?norm\.weight$", name):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("sinks"):
                parameter.uniform_(4.0, 9.0)  # as large as the largest scores
    model.save_pretrained(folder)
    return folder


def remove_sinks(folder: Path) -> Path:
    """Set the attention sinks of a tiny checkpoint so low that they take nothing.

    Args:
        folder: a checkpoint written by :func:`save_tiny_model`.

    Returns:
        ``folder``.
    """
    weights = load_file(folder / "model.safetensors")
    sinks = [name for name in weights if name.endswith("sinks")]
    assert sinks
    for name in sinks:
        weights[name].fill_(-1e4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantize_tiny_model(folder: Path, names: str = r"_proj\.weight$") -> Path:
    """Rewrite a tiny checkpoint's linear layers to INT8 weights in the compressed-tensors format (dynamic INT8 inputs).

    Weights reach from -63 to 63: with larger ones oneDNN's products overflow on processors without VNNI.

    Args:
        folder: a checkpoint written by :func:`save_tiny_model`.
        names: a regular expression for the names of their weights.

    Returns:
        ``folder``.
    """
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if re.search(names, name)]:
        weight = weights[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 63
        weights[name] = (weight / scale).round().clamp(-63, 63).to(torch.int8)
        weights[f"{name}_scale"] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    eight_bit = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bit, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bit, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_paligemma(folder: Path) -> Path:
    """Write a PaliGemma: text behind an image, whose tokens see each other in both directions.

    Args:
        folder: where to write.

    Returns:
        ``folder``.
    """
    text = {**COMMON, "model_type": "gemma", "head_dim": 32, "num_image_tokens": 4}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 128,
        "model_type": "siglip_vision_model",
    }
    torch.manual_seed(0)
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=300, projection_dim=128, hidden_size=128
    )
    transformers.PaliGemmaForConditionalGeneration(config).float().save_pretrained(folder)
    return folder
