"""Calibrated factors of a checkpoint, made in memory as ``xquant factorize`` writes them to a folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from xquant_vllm.integration.factors import Bases, LayerWeights, spec_of
from xquant_vllm.integration.formats import LayerFormat
from xquant_vllm.integration.settings import XQuantSettings
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.factorizer import ChainFactorizer, Factorizer, Statistics
from xquant_vllm.offline.statistics import collect_statistics
from xquant_vllm.projection.joint_kv import JointKVBasis
from xquant_vllm.projection.predicted import PredictedLink


@dataclass(frozen=True)
class CalibratedFactors:
    """Bases, or links of a predicted chain, by layer; see :class:`xquant_vllm.integration.cache_builder.Factors`."""

    bases: dict[int, Bases] = field(default_factory=dict)
    links: dict[int, PredictedLink] = field(default_factory=dict)

    def layer_factors(self, layer: LayerWeights) -> Bases:
        """Key basis and value basis of a layer, on the device of its weights."""
        return self.bases[layer.layer_index]

    def joint_basis(self, layer: LayerWeights) -> JointKVBasis:
        """There is none: a chain on a text is a predicted one."""
        raise KeyError(layer.layer_index)

    def layer_link(self, layer: LayerWeights, layers_of_group: int) -> PredictedLink | None:
        """A layer of the chain, whose place in its group the fit has known."""
        return self.links[layer.layer_index]


def calibrate(
    checkpoint: Checkpoint,
    settings: XQuantSettings,
    formats: Sequence[LayerFormat],
    batch: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> CalibratedFactors:
    """Factorize all layers on a text.

    Args:
        checkpoint: the checkpoint.
        settings: the settings.
        formats: what they make of its layers.
        batch: token ids ``[sequences, length]``.
        dtype: to serve in.
        device: where to compute.

    Raises:
        RefusedError: the model's attention is not recognized.
    """
    spec = spec_of(settings, dtype)
    factorizer = Factorizer(checkpoint, spec, device)
    chain = ChainFactorizer(factorizer, formats, spec) if settings.method == "xquant-cl" else None
    factors = CalibratedFactors()

    def on_layer(layer: int, statistics: Statistics, hidden: torch.Tensor) -> None:
        if chain is not None:
            factors.links[layer] = chain.link(layer, statistics, hidden)
        elif formats[layer].holds == "latent":
            factors.bases[layer] = factorizer.bases(layer, statistics)

    collect_statistics(checkpoint, batch, device, on_layer)
    return factors
