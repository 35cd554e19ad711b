"""A checkpoint's layers factorized, data-free or on a text: for a folder of factors, or for an evaluation at once."""

from collections.abc import Sequence

import torch

from xquant_vllm.integration.factors import Bases
from xquant_vllm.integration.formats import LayerFormat
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.projection.calibration import ProjectionStatistics
from xquant_vllm.projection.layer import BasisSpec, factorize_layer
from xquant_vllm.projection.predicted import LinkFormat, PredictedChain, PredictedLink

Statistics = tuple[ProjectionStatistics, ProjectionStatistics]


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
        key, value = (weight.to(self._spec.dtype) for weight in self._checkpoint.key_value(layer))
        return key, value

    def bases(self, layer: int, statistics: Statistics | None) -> Bases:
        """Key basis and value basis, data-free without statistics."""
        key, value = (weight.to(self._device) for weight in self.weights(layer))
        with torch.no_grad():
            return factorize_layer(key, value, self._checkpoint.kv_heads, self._spec, statistics)


class ChainFactorizer:
    """Fits a predicted chain, layer after layer in the order of the model."""

    def __init__(self, factorizer: Factorizer, formats: Sequence[LayerFormat], spec: BasisSpec) -> None:
        """Start.

        Args:
            factorizer: reads the weights.
            formats: what the layers' pages hold, one stream each.
            spec: rotation and dtype.
        """
        self._factorizer = factorizer
        self._forms = [
            LinkFormat(stream.bits, stream.group_size, stream.outlier_channels, anchor=not form.reads)
            for form in formats
            for stream in form.streams
        ]
        self._fit = PredictedChain(spec.rotate, spec.dtype)

    def link(self, layer: int, statistics: Statistics, hidden: torch.Tensor) -> PredictedLink:
        """The next layer, from the statistics of a text and the layer's inputs ``[num_tokens, hidden_size]`` on it."""
        key, value = (weight.to(hidden.device) for weight in self._factorizer.weights(layer))
        importances = (statistics[0].importance, statistics[1].importance)
        with torch.no_grad():
            return self._fit.add(hidden, key, value, importances, self._forms[layer])
