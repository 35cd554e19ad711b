"""XQuant as published (Tomar et al., arXiv 2508.10395, sections 3.1 and 3.2). There is no official code.

Grouped queries (``d_kv < d``): ``Wk = Uk Sk Bk^T`` and ``Wv = Uv Sv Bv^T``, whole, not head by head. ``X Uk`` is
quantized per channel in groups of 128 tokens, ``X Uv`` per token in groups of 128 channels. Multi-head (``d_kv >= d``):
X itself, per token in groups of 128 channels. No rotation, no channel apart.

The paper leaves an incomplete last group of tokens in 16 bit. Here every token that attention reads is quantized, so
that group, too; its bytes are counted as if it were full.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.evaluation.methods.baselines.groups import per_channel, per_channel_bytes, per_token, per_token_bytes
from xquant_vllm.evaluation.model.cache_method import InputMethod

GROUP_SIZE = 128


@dataclass(frozen=True)
class DenseLayer:
    """A layer's projections.

    Attributes:
        key: ``[d, d_kv]``, FP32.
        value: likewise.
        key_bias: ``[d_kv]``, FP32; zeros without.
        value_bias: likewise.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_bias: torch.Tensor
    value_bias: torch.Tensor

    @property
    def grouped(self) -> bool:
        """Whether the paper takes latents (GQA) and not X (MHA)."""
        return self.key.shape[1] < self.key.shape[0]

    def rematerialize(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[num_tokens, d_kv]`` of inputs ``[num_tokens, d]``, FP32."""
        return hidden @ self.key + self.key_bias, hidden @ self.value + self.value_bias


class LatentLayer:
    """One layer of grouped queries, with its decompositions."""

    def __init__(self, layer: DenseLayer) -> None:
        """Decompose."""
        self._layer = layer
        self._key_down, self._key_up = decompose(layer.key)
        self._value_down, self._value_up = decompose(layer.value)

    def read(self, hidden: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[num_tokens, d_kv]`` from quantized latents of inputs ``[num_tokens, d]``."""
        keys = per_channel(hidden @ self._key_down, bits, GROUP_SIZE) @ self._key_up
        values = per_token(hidden @ self._value_down, bits, GROUP_SIZE) @ self._value_up
        return keys + self._layer.key_bias, values + self._layer.value_bias


class PaperXQuant(InputMethod):
    """Every layer by itself."""

    def __init__(self, layers: Sequence[DenseLayer], bits: int) -> None:
        """Prepare; the layers are decomposed where the paper does so."""
        self._bits = bits
        self._layers = [LatentLayer(layer) if layer.grouped else layer for layer in layers]

    def rematerialize(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the quantized latents, or the quantized input."""
        of = self._layers[layer]
        if isinstance(of, LatentLayer):
            return of.read(hidden.float(), self._bits)
        return of.rematerialize(per_token(hidden, self._bits, GROUP_SIZE))


def decompose(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``U`` ``[d, n]`` and ``S B^T`` ``[n, n]`` of a matrix ``[d, n]``, computed in FP64, returned in FP32."""
    u, s, vh = torch.linalg.svd(columns.double(), full_matrices=False)
    return u.float(), (s.unsqueeze(1) * vh).float()


def xquant_bytes(hidden_size: int, channels: int, bits: int) -> float:
    """Bytes of a token in one layer.

    Args:
        hidden_size: d.
        channels: d_kv.
        bits: bits per code.
    """
    if channels < hidden_size:
        return per_channel_bytes(channels, bits, GROUP_SIZE) + per_token_bytes(channels, bits, GROUP_SIZE)
    return per_token_bytes(hidden_size, bits, GROUP_SIZE)
