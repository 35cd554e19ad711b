"""Calibrated factors of a checkpoint: what ``xquant factorize`` writes to a folder, and an evaluation takes at once."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.samples import collect_samples
from xquant_vllm.projection.calibrated import fit_heads, layer_budget
from xquant_vllm.projection.joint_kv import JointKVBasis
from xquant_vllm.projection.predicted import PredictedChain, PredictedLink, layers_of_groups
from xquant_vllm.scheme.factor_reader import Bases
from xquant_vllm.scheme.layer_weights import LayerWeights
from xquant_vllm.scheme.settings import XQuantSettings

# What a channel can be given, on average: with more, a budget would not be spent.
CALIBRATED_BITS = (8, 4, 3, 2)


@dataclass(frozen=True)
class CalibrationPlan:
    """What is to be fitted.

    Attributes:
        joint_kv: one latent for keys and values of all kv heads, instead of one for each and every kv head.
        budget: bytes per token of every layer.
        anchors: of a joint latent, which layers nothing predicts.
    """

    joint_kv: bool
    budget: int
    anchors: tuple[bool, ...]

    @property
    def layers_of_groups(self) -> list[int]:
        """For every layer, how many layers its group has so far, itself included."""
        return layers_of_groups(self.anchors)


def plan_calibration(checkpoint: Checkpoint, settings: XQuantSettings) -> CalibrationPlan:
    """What settings ask for.

    Raises:
        RefusedError: they ask for what is not fitted.
    """
    bits = settings.bits
    if bits.key != bits.value or bits.key not in CALIBRATED_BITS:
        raise RefusedError(
            f"xquant: --bits {bits} cannot work with --calibration, which shares one budget out among keys, values and "
            "their channels: set one number, 8, 4, 3 or 2"
        )
    chained = settings.method == "xquant-cl"
    narrow = checkpoint.hidden_size < 2 * checkpoint.kv_heads * checkpoint.head_size
    joint_kv = chained or settings.basis == "joint" or ("basis" not in settings.model_fields_set and narrow)
    sizes = (checkpoint.kv_heads, checkpoint.head_size, checkpoint.hidden_size)
    budget = layer_budget(*sizes, bits.key, joint_kv=joint_kv)
    filled = settings.for_chain("latent")
    anchors = tuple(not chained or filled.is_anchor(layer) for layer in range(checkpoint.layers))
    return CalibrationPlan(joint_kv, budget, anchors)


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer: two bases or a joint latent, and the bits of their channels."""

    factors: Bases | PredictedLink
    allocation: LayerAllocation


def fit_layers(
    checkpoint: Checkpoint, plan: CalibrationPlan, batch: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> Iterator[CalibratedLayer]:
    """Fit all layers to a text, in order.

    Args:
        checkpoint: the checkpoint.
        plan: what to fit.
        batch: token ids ``[sequences, length]``.
        dtype: to serve in.
        device: where to compute.

    Raises:
        RefusedError: the model's attention is not recognized.
    """
    samples = collect_samples(checkpoint, batch, device)
    chain = PredictedChain(dtype)
    heads = checkpoint.kv_heads
    for layer, sample in enumerate(samples):
        # Rounded first, because that is what a server has.
        key, value = (weight.to(dtype).to(device) for weight in checkpoint.key_value(layer))
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
