"""XQuant-CL as published (Tomar et al., arXiv 2508.10395, section 3.3). There is no official code.

The first three layers are XQuant at 4 bits and the third is the base. After it every layer caches a difference from the
estimate of the layer before: of X itself (multi-head), ``dX = Q(X - Xhat)``, ``Xhat += dX``; or of latents (grouped
queries) with ``[Wk|Wv] = U S B^T``, ``s = Q((X - Xhat) U)``, ``Xhat += s U^T``, keys and values being ``Xhat [Wk|Wv]``.
All of it per token in groups of 128 channels.

Two things favour the paper here: its accumulator, which it keeps in typically 4 bits, is exact, and it is not counted
in the bytes. What the estimate starts from in a grouped-query model, where XQuant's latents do not say what X was, the
paper leaves open. Of three readings the one taken here measured best and takes the paper's bytes: the third layer
caches ``Q(X U)``, so ``Xhat = s U^T``. (The others, X itself in the third layer or in all three, lost more on SmolLM2.)
"""

from collections.abc import Sequence

import torch

from xquant_vllm.evaluation.methods.baselines.groups import per_token, per_token_bytes
from xquant_vllm.evaluation.methods.baselines.paper_xquant import (
    GROUP_SIZE,
    DenseLayer,
    LatentLayer,
    decompose,
    xquant_bytes,
)
from xquant_vllm.evaluation.model.cache_method import InputMethod

FIRST_LAYERS = 3


class PaperXQuantCL(InputMethod):
    """Layers as differences, with an exact accumulator."""

    def __init__(self, layers: Sequence[DenseLayer], bits: int) -> None:
        """Prepare; layers of grouped queries are decomposed, keys and values together from the base on."""
        self._layers, self._bits = layers, bits
        base = FIRST_LAYERS - 1
        self._first = [LatentLayer(layer) if layer.grouped else None for layer in layers[:base]]
        self._bases = [
            decompose(torch.cat((layer.key, layer.value), 1))[0] if layer.grouped and index >= base else None
            for index, layer in enumerate(layers)
        ]
        self._estimate = torch.empty(0)

    def rematerialize(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the accumulator, to which the layer's difference is added first."""
        hidden, bits, base = hidden.float(), self._bits, self._bases[layer]
        if layer < FIRST_LAYERS:
            bits = first_bits(bits)
            self._estimate = torch.zeros_like(hidden)
        latents = self._first[layer] if layer < len(self._first) else None
        if latents is not None:
            return latents.read(hidden, bits)
        difference = hidden - self._estimate
        if base is None:
            self._estimate = self._estimate + per_token(difference, bits, GROUP_SIZE)
        else:
            self._estimate = self._estimate + per_token(difference @ base, bits, GROUP_SIZE) @ base.T
        return self._layers[layer].rematerialize(self._estimate)


def first_bits(bits: int) -> int:
    """Bits of the first layers: 4, or more if the others have more."""
    return max(4, bits)


def xquant_cl_bytes(hidden_size: int, channels: int, bits: int, num_layers: int) -> float:
    """Bytes of a token in all layers, the accumulator apart.

    Args:
        hidden_size: d.
        channels: d_kv.
        bits: bits per code.
        num_layers: layers of the model.
    """
    width = min(2 * channels, hidden_size)
    before_base = FIRST_LAYERS - 1
    total = 0.0
    for layer in range(num_layers):
        if layer < before_base:
            total += xquant_bytes(hidden_size, channels, first_bits(bits))
        else:
            total += per_token_bytes(width, bits if layer > before_base else first_bits(bits), GROUP_SIZE)
    return total
