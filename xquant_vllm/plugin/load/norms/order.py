"""Norms behind RoPE, which have to precede it once keys are rematerialized.

An RMS norm commutes with a rotation, its weights do not, unless those of the channels that turn together are alike.
Weights behind RoPE multiply queries instead: the scores are the same.
"""

from dataclasses import replace

import torch

from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.projection.key_norm import KeyNorm
from xquant_vllm.projection.rope import RotaryTable

# Of cos^2 + sin^2: beyond it a table does not only turn.
_ROTATES = 1e-3


def before_rope(who: str, norm: KeyNorm, rope: RotaryTable) -> KeyNorm:
    """What a norm behind RoPE is before it.

    Args:
        who: the attention module, for errors.
        norm: the norm.
        rope: what turns keys before it.

    Raises:
        UnsupportedError: it cannot precede RoPE.
    """
    if norm.centered:
        raise unsupported_model(f"{who} subtracts the mean of its keys behind RoPE, which is not supported")
    if bool((rope.cos.square() + rope.sin.square() - 1).abs().max() > _ROTATES):
        raise unsupported_model(f"{who} normalizes its keys behind a RoPE that scales them, which is not supported")
    turned = norm.weight[:, : rope.rotary_size]
    first, second = (turned[:, 0::2], turned[:, 1::2]) if rope.interleaved else turned.chunk(2, -1)
    if torch.equal(first, second):
        return norm
    return replace(norm, weight=torch.ones_like(norm.weight), query_weight=norm.weight)
