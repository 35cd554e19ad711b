"""Keep a model from rotating its keys, which are cached before RoPE (KIVI*) and rotated when they are read."""

from typing import Any

import torch

from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.call import exchange
from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.modules import QueryOnlyRotary
from xquant_vllm.plugin.load.probe import make_probe
from xquant_vllm.plugin.load.proof import differences
from xquant_vllm.plugin.load.recognize import recognize
from xquant_vllm.plugin.registration import KIVI_BACKEND_NAME
from xquant_vllm.projection.rope import RotaryTable, apply_rope


def take_keys_before_rope(name: str, module: Any, attention: Any) -> RotaryTable | None:
    """Let an attention module rotate its queries alone, and check that its keys can be rotated later.

    Args:
        name: the module's name in the model.
        module: the module that owns ``attention``; its weights are loaded and processed.
        attention: vLLM's attention layer.

    Returns:
        What rotates the keys; None where the layer has no RoPE.

    Raises:
        UnsupportedError: the module is not built from known parts, or treats its keys otherwise.
    """
    parts = recognize(name, module, attention)
    if parts.rope is None or parts.rope_child is None:
        return None
    if parts.key_norm is not None and parts.key_norm.query_weight is not None:
        raise unsupported_model(
            f"{type(module).__name__} at {name} normalizes its keys behind RoPE, so that they cannot be cached before "
            "it (leave pre_rope out to cache them after RoPE)",
            KIVI_BACKEND_NAME,
        )
    dtype = attention.impl.vllm_config.model_config.dtype
    like = torch.empty(0, dtype=dtype, device=parts.rope.cos.device)
    probe = make_probe(parts, parts.hidden_size, like)
    hidden, positions = probe.hidden, probe.given
    before = capture_qkv(name, module, parts.attention_child, hidden, positions)
    exchange(module, parts.rope_child, QueryOnlyRotary(module.get_submodule(parts.rope_child)))
    after = capture_qkv(name, module, parts.attention_child, hidden, positions)
    keys = after[1].float().unflatten(1, (-1, attention.head_size))
    rebuilt = after[0].float(), apply_rope(keys, probe.positions, parts.rope).flatten(1), after[2].float()
    for what, error, tolerance in differences(before, rebuilt):
        raise unsupported_model(
            f"{type(module).__name__} at {name} is not recognized: its {what} differ by {error:.1e} (relative, "
            f"tolerance {tolerance:.0e}) when keys are rotated after they were cached (leave pre_rope out to cache "
            "them after RoPE)",
            KIVI_BACKEND_NAME,
        )
    return parts.rope
