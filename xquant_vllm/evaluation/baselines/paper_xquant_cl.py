"""XQuant-CL as published (Tomar et al., arXiv 2508.10395, section 3.3). There is no official code.

The first three layers are XQuant at 4 bits and the third is the base. After it every layer caches a difference from the
estimate of the layer before: of X itself (multi-head), ``dX = Q(X - Xhat)``, ``Xhat += dX``; or of latents (grouped
queries) with ``[Wk|Wv] = U S B^T``, ``s = Q((X - Xhat) U)``, ``Xhat += s U^T``, keys and values being ``Xhat [Wk|Wv]``.
All of it per token in groups of 128 channels.

Two things favour the paper here: its accumulator, which it keeps in typically 4 bits, is exact, and it is not counted
in the bytes. What the base of a grouped-query model is, latents not saying what X was, the paper leaves open: here the
first three layers cache X, at 4 bits, and its bytes are counted.
"""

from collections.abc import Sequence

import torch

from xquant_vllm.evaluation.baselines.groups import per_token, per_token_bytes
from xquant_vllm.evaluation.baselines.paper_xquant import GROUP_SIZE, DenseLayer, decompose
from xquant_vllm.evaluation.cache_method import InputMethod

FIRST_LAYERS = 3
_FIRST_BITS = 4


class PaperXQuantCL(InputMethod):
    """Layers as differences, with an exact accumulator."""

    def __init__(self, layers: Sequence[DenseLayer], bits: int) -> None:
        """Prepare; layers of grouped queries are decomposed, keys and values together."""
        self._layers, self._bits = layers, bits
        self._bases = [
            decompose(torch.cat((layer.key, layer.value), 1))[0] if layer.grouped and index >= FIRST_LAYERS else None
            for index, layer in enumerate(layers)
        ]
        self._estimate = torch.empty(0)

    def rematerialize(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the accumulator, to which the layer's difference is added first."""
        hidden, base = hidden.float(), self._bases[layer]
        if layer < FIRST_LAYERS:
            self._estimate = per_token(hidden, max(_FIRST_BITS, self._bits), GROUP_SIZE)
        elif base is None:
            self._estimate = self._estimate + per_token(hidden - self._estimate, self._bits, GROUP_SIZE)
        else:
            stored = per_token((hidden - self._estimate) @ base, self._bits, GROUP_SIZE)
            self._estimate = self._estimate + stored @ base.T
        return self._layers[layer].rematerialize(self._estimate)


def xquant_cl_bytes(hidden_size: int, channels: int, bits: int, num_layers: int) -> float:
    """Bytes of a token in all layers, the accumulator apart.

    Args:
        hidden_size: d.
        channels: d_kv.
        bits: bits per code.
        num_layers: layers of the model.
    """
    first = min(FIRST_LAYERS, num_layers)
    width = min(2 * channels, hidden_size)
    return first * per_token_bytes(hidden_size, max(_FIRST_BITS, bits), GROUP_SIZE) + (
        num_layers - first
    ) * per_token_bytes(width, bits, GROUP_SIZE)
