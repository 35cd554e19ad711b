"""Tiny random checkpoints of hybrid models: some layers attend, others keep a state."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny_models import save_random_weights

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.12,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 32, "mamba_chunk_size": 64}
_FOUR = ["linear_attention", "full_attention"] * 2

FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    # Short convolutions, norms of every head, RoPE.
    "lfm2": (
        transformers.Lfm2Config,
        {
            "num_hidden_layers": 5,
            "full_attn_idxs": [2, 4],
            "conv_L_cache": 3,
            # As in the published checkpoints; transformers itself does without.
            "conv_dim": 128,
            "block_dim": 128,
            "block_ff_dim": 192,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    # Mamba 2, no RoPE.
    "nemotron-h": (
        transformers.NemotronHConfig,
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention", "full_attention"],
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 32,
            "n_groups": 1,
            "chunk_size": 64,
        },
    ),
    "granite-4": (
        transformers.GraniteMoeHybridConfig,
        {
            **_MAMBA2,
            "num_hidden_layers": 4,
            "layer_types": _FOUR,
            "num_local_experts": 0,
            "shared_intermediate_size": 192,
            "attention_multiplier": 32**-0.5,
            "position_embedding_type": None,
            "tie_word_embeddings": False,
        },
    ),
    # Both in every layer.
    "falcon-h1": (
        transformers.FalconH1Config,
        {**_MAMBA2, "mamba_d_ssm": 256, "num_hidden_layers": 3, "key_multiplier": 0.7, "head_dim": 32},
    ),
    # Mamba 1, no RoPE; attention is a part of the layer itself.
    "jamba": (
        transformers.JambaConfig,
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 16},
    ),
    # Gated attention beside gated delta rules.
    "qwen3-next": (
        transformers.Qwen3NextConfig,
        {
            "num_hidden_layers": 4,
            "layer_types": _FOUR,
            "head_dim": 64,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
}


def save_tiny_hybrid(folder: Path, family: str, **changes: Any) -> Path:
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
    return save_random_weights(folder, transformers.AutoModelForCausalLM.from_config(config))
