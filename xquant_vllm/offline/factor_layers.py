"""The factors of a checkpoint's layers, one after another: from the weights alone, or fitted to a text."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.offline.calibration.calibrated import fit_layers
from xquant_vllm.offline.calibration.calibration_plan import CalibrationPlan
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.factorizer import Factorizer
from xquant_vllm.projection.ahead import AheadPool
from xquant_vllm.projection.basis import BasisKind
from xquant_vllm.projection.factor_file import head_fingerprints, layer_shapes, layer_tensors
from xquant_vllm.projection.layer import BasisSpec
from xquant_vllm.projection.predicted import PredictedLink, link_shapes, link_tensors
from xquant_vllm.scheme.factor_reader import Bases, joint_kv_name

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class FactorLayer:
    """What a layer adds to the file of factors and to its header.

    Attributes:
        tensors: by name.
        fingerprints: of the weights of every kv head.
        allocation: bits of its channels; None where all have the same.
    """

    tensors: Mapping[str, torch.Tensor]
    fingerprints: list[str]
    allocation: LayerAllocation | None = None


@dataclass(frozen=True)
class FactorLayers:
    """All layers, which are computed as they are asked for, and what tensors they will have."""

    shapes: Shapes
    layers: Generator[FactorLayer, None, None]


def data_free_layers(checkpoint: Checkpoint, spec: BasisSpec, device: torch.device) -> FactorLayers:
    """Factors from the weights alone.

    Args:
        checkpoint: the checkpoint.
        spec: what to make.
        device: where to compute.

    Raises:
        RefusedError: a weight cannot be used; when its layer is asked for.
    """
    factorizer = Factorizer(checkpoint, spec, device)

    def layer_of(layer: int) -> tuple[Bases, list[str]]:
        return factorizer.bases(layer), _fingerprints(checkpoint, layer, spec.dtype)

    def layers() -> Generator[FactorLayer, None, None]:
        # Side by side, a few layers ahead of the one that is written.
        with AheadPool(layer_of) as pool:
            pool.announce(range(checkpoint.layers))
            for layer in range(checkpoint.layers):
                bases, fingerprints = pool.take(layer)
                yield FactorLayer(layer_tensors(layer, *bases), fingerprints)

    return FactorLayers(_shapes(checkpoint, spec.kind, spec.dtype), layers())


def calibrated_layers(
    checkpoint: Checkpoint,
    plan: CalibrationPlan,
    batch: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    kept: Path | None = None,
) -> FactorLayers:
    """Factors fitted to a text; the model has run on it when this returns.

    Args:
        checkpoint: the checkpoint.
        plan: what to fit.
        batch: token ids ``[sequences, length]``.
        dtype: to serve in.
        device: where to compute.
        kept: see :func:`xquant_vllm.offline.calibration.calibrated.fit_layers`.

    Raises:
        RefusedError: the model cannot be run.
    """
    fitted = fit_layers(checkpoint, plan, batch, dtype, device, kept)

    def layers() -> Generator[FactorLayer, None, None]:
        for layer, of_layer in enumerate(fitted):
            if isinstance(of_layer.factors, PredictedLink):
                named = link_tensors(of_layer.factors)
                tensors = {joint_kv_name(layer, name): tensor for name, tensor in named.items()}
            else:
                tensors = layer_tensors(layer, *of_layer.factors)
            yield FactorLayer(tensors, _fingerprints(checkpoint, layer, dtype), of_layer.allocation)

    shapes = _link_shapes(checkpoint, plan, dtype) if plan.joint_kv else _shapes(checkpoint, "head", dtype)
    return FactorLayers(shapes, layers())


def _fingerprints(checkpoint: Checkpoint, layer: int, dtype: torch.dtype) -> list[str]:
    key, value = checkpoint.served_key_value(layer, dtype)
    return head_fingerprints(key, value, checkpoint.kv_heads)


def _shapes(checkpoint: Checkpoint, kind: BasisKind, dtype: torch.dtype) -> Shapes:
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for layer in range(checkpoint.layers):
        shapes |= layer_shapes(layer, checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size, kind, dtype)
    return shapes


def _link_shapes(checkpoint: Checkpoint, plan: CalibrationPlan, dtype: torch.dtype) -> Shapes:
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for layer, layers_of_group in enumerate(plan.layers_of_groups):
        link = link_shapes(checkpoint.hidden_size, checkpoint.kv_heads, checkpoint.head_size, layers_of_group, dtype)
        shapes |= {joint_kv_name(layer, name): form for name, form in link.items()}
    return shapes
