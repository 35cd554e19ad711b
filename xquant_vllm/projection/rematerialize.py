"""From latents to keys and values: everything the model does to a key after its projection, moved behind the cache."""

from dataclasses import dataclass

import torch

from xquant_vllm.projection.rope import RotaryTable, apply_rope


@dataclass(frozen=True)
class HeadNorm:
    """RMS norm over the channels of every key head (Qwen3, Gemma 3, Command-R+).

    Attributes:
        weight: ``[head_size]`` or ``[num_kv_heads, head_size]``, FP32, the factor itself (Gemma's ``1 + w`` already
            added).
        eps: added to the mean square.
    """

    weight: torch.Tensor
    eps: float

    def weights(self, num_kv_heads: int) -> torch.Tensor:
        """The weights of every head, ``[num_kv_heads, head_size]``; a view where heads share them."""
        return self.weight.expand(num_kv_heads, -1)


@dataclass(frozen=True)
class LayerProjection:
    """What turns one layer's cached latents back into keys and values.

    Attributes:
        up_key: ``[num_kv_heads, key_width, head_size]``, FP32.
        up_value: ``[num_kv_heads, value_width, head_size]``, FP32; None: value latents are the values, because what
            follows attention multiplies by it.
        key_bias: ``[num_kv_heads, head_size]``, FP32, or None.
        value_bias: ``[num_kv_heads, head_size]``, FP32, or None.
        key_norm: norm between bias and RoPE, or None.
        rope: rotary table, or None for a layer without RoPE.
    """

    up_key: torch.Tensor
    up_value: torch.Tensor | None
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None
    key_norm: HeadNorm | None = None
    rope: RotaryTable | None = None

    @property
    def num_kv_heads(self) -> int:
        """Kv heads of this rank."""
        return self.up_key.shape[0]

    @property
    def head_size(self) -> int:
        """Channels of a key or value head."""
        return self.up_key.shape[2]

    @property
    def value_width(self) -> int:
        """Channels of a value latent."""
        return self.head_size if self.up_value is None else self.up_value.shape[1]


def up_project(latents: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """Multiply every kv head's latent by its up-projection.

    Args:
        latents: ``[num_tokens, latent_heads, width]``, FP32; with one latent head all kv heads read it.
        up: ``[num_kv_heads, width, head_size]``, FP32; None for the latents themselves, of which there must then be
            one for every kv head.

    Returns:
        ``[num_tokens, num_kv_heads, head_size]``, FP32.
    """
    if up is None:
        return latents
    latents = latents.expand(-1, up.shape[0], -1)
    return torch.einsum("thw,hws->ths", latents, up)


def rematerialize_keys(latents: torch.Tensor, positions: torch.Tensor, projection: LayerProjection) -> torch.Tensor:
    """Keys as the model would have cached them: up-projection, bias, norm, RoPE, in this order.

    Args:
        latents: ``[num_tokens, latent_heads, key_width]``, FP32.
        positions: ``[num_tokens]``, the tokens' positions.
        projection: the layer's projection.

    Returns:
        ``[num_tokens, num_kv_heads, head_size]``, FP32.
    """
    return finish_keys(up_project(latents, projection.up_key), positions, projection)


def finish_keys(keys: torch.Tensor, positions: torch.Tensor, projection: LayerProjection) -> torch.Tensor:
    """What the model does to a key after its projection: bias, norm, RoPE, in this order.

    Args:
        keys: ``[num_tokens, num_kv_heads, head_size]``, FP32.
        positions: ``[num_tokens]``, the tokens' positions.
        projection: the layer's projection.

    Returns:
        Likewise.
    """
    if projection.key_bias is not None:
        keys = keys + projection.key_bias
    if projection.key_norm is not None:
        mean_square = keys.square().mean(-1, keepdim=True)
        keys = keys * torch.rsqrt(mean_square + projection.key_norm.eps) * projection.key_norm.weight
    if projection.rope is not None:
        keys = apply_rope(keys, positions, projection.rope)
    return keys


def rematerialize_values(latents: torch.Tensor, projection: LayerProjection) -> torch.Tensor:
    """Values as the model would have cached them; attention itself never needs this (V is absorbed).

    Args:
        latents: ``[num_tokens, latent_heads, value_width]``, FP32.
        projection: the layer's projection.

    Returns:
        ``[num_tokens, num_kv_heads, head_size]``, FP32.
    """
    values = up_project(latents.expand(-1, projection.num_kv_heads, -1), projection.up_value)
    return values if projection.value_bias is None else values + projection.value_bias
