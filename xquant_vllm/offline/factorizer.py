"""A checkpoint's layers factorized from the weights alone."""

import torch

from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.projection.layer import BasisSpec, factorize_layer
from xquant_vllm.scheme.factor_reader import Bases


class Factorizer:
    """Factorizes layers by themselves, in any order."""

    def __init__(self, checkpoint: Checkpoint, spec: BasisSpec, device: torch.device) -> None:
        """Prepare.

        Args:
            checkpoint: the checkpoint.
            spec: what to make.
            device: where to compute.
        """
        self._checkpoint, self._spec, self._device = checkpoint, spec, device

    def weights(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value weights, rounded as they are served: with or without a file, a server has the same latents."""
        return self._checkpoint.served_key_value(layer, self._spec.dtype)

    def bases(self, layer: int) -> Bases:
        """Key basis and value basis."""
        key, value = (weight.to(self._device) for weight in self.weights(layer))
        with torch.no_grad():
            return factorize_layer(key, value, self._checkpoint.kv_heads, self._spec)
