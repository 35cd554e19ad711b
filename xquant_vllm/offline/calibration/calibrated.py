"""Calibrated factors of a checkpoint: what ``xquant factorize`` writes to a folder, and an evaluation takes at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.offline.calibration.calibration_plan import CalibrationPlan
from xquant_vllm.offline.calibration.samples import collect_kept_samples, collect_samples
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.projection.calibrated import fit_heads
from xquant_vllm.projection.calibration import LayerSample
from xquant_vllm.projection.joint_kv import JointKVBasis
from xquant_vllm.projection.predicted import PredictedChain, PredictedLink
from xquant_vllm.scheme.factor_reader import Bases
from xquant_vllm.scheme.layer_weights import LayerWeights


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer: two bases or a joint latent, and the bits of their channels."""

    factors: Bases | PredictedLink
    allocation: LayerAllocation


def fit_layers(
    checkpoint: Checkpoint,
    plan: CalibrationPlan,
    batch: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    kept: Path | None = None,
) -> Iterator[CalibratedLayer]:
    """Run the model on a text, and then fit its layers one by one, in order, as they are asked for.

    Args:
        checkpoint: the checkpoint.
        plan: what to fit.
        batch: token ids ``[sequences, length]``.
        dtype: to serve in.
        device: where to compute.
        kept: folder for what the model shows on the way, for this model, text and device alone: what is there is not
            computed again. None for this process's memory.

    Raises:
        RefusedError: the model's attention is not recognized.
    """
    # At once and not with the first layer, whose time it would seem to be.
    samples: Iterable[LayerSample] = (
        collect_samples(checkpoint, batch, device)
        if kept is None
        else collect_kept_samples(checkpoint, batch, device, kept)
    )
    return _fitted(checkpoint, plan, samples, dtype, device)


def _fitted(
    checkpoint: Checkpoint,
    plan: CalibrationPlan,
    samples: Iterable[LayerSample],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[CalibratedLayer]:
    chain = PredictedChain(dtype)
    heads = checkpoint.kv_heads
    for layer, sample in enumerate(samples):
        # Rounded first, because that is what a server has.
        key, value = (weight.to(device) for weight in checkpoint.served_key_value(layer, dtype))
        with torch.no_grad():
            if plan.joint_kv:
                link, runs = chain.add(sample, key, value, heads, plan.budget, plan.anchors[layer])
                yield CalibratedLayer(link, ((runs,),))
            else:
                fit = fit_heads(sample, key, value, heads, plan.budget, dtype)
                yield CalibratedLayer((fit.key, fit.value), (fit.key_runs, fit.value_runs))


@dataclass(frozen=True)
class CalibratedFactors:
    """All layers in memory; see :class:`xquant_vllm.scheme.builder.Factors`."""

    layers: dict[int, CalibratedLayer] = field(default_factory=dict)

    @property
    def allocations(self) -> dict[int, LayerAllocation]:
        """Bits of every layer's channels."""
        return {layer: fitted.allocation for layer, fitted in self.layers.items()}

    def layer_factors(self, layer: LayerWeights) -> Bases:
        """Key basis and value basis of a layer."""
        factors = self.layers[layer.layer_index].factors
        assert isinstance(factors, tuple)
        return factors

    def joint_kv_basis(self, layer: LayerWeights) -> JointKVBasis:
        """There is none: calibrated latents of keys and values together are links."""
        raise KeyError(layer.layer_index)

    def layer_link(self, layer: LayerWeights, layers_of_group: int) -> PredictedLink | None:
        """A layer's joint latent, whose place in its group the fit has known."""
        factors = self.layers[layer.layer_index].factors
        assert isinstance(factors, PredictedLink)
        return factors
