"""Tiny random checkpoints of real architectures, made by transformers and saved like any model."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

_COMMON: dict[str, Any] = {
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

FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-bias": (transformers.LlamaConfig, {"attention_bias": True}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 48, "head_dim": 32}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 80}),
    "mha": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "mqa": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "phi3": (transformers.Phi3Config, {}),
    "opt": (transformers.OPTConfig, {"num_key_value_heads": 4, "ffn_dim": 192, "word_embed_proj_dim": 128}),
    # Partial RoPE whose pairs lie side by side.
    "glm": (transformers.GlmConfig, {"head_dim": 32}),
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
    config = config_class(**{**_COMMON, **settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh biases are zero and fresh norms one, which would hide that they are forgotten.
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def quantize_tiny_model(folder: Path) -> Path:
    """Rewrite a tiny checkpoint's linear layers to INT8 weights in the compressed-tensors format (dynamic INT8 inputs).

    Args:
        folder: a checkpoint written by :func:`save_tiny_model`.

    Returns:
        ``folder``.
    """
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "_proj.weight" in name]:
        weight = weights[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        weights[name] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
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
