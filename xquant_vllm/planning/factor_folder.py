"""What a folder of factors says of its cache."""

from xquant_vllm.planning.caches import CHAIN, HEAD, JOINT, Kind, layer_shapes
from xquant_vllm.planning.losses import Losses, certified_losses
from xquant_vllm.planning.model_files import ModelFiles
from xquant_vllm.planning.planned_model import PlannedModel
from xquant_vllm.planning.serving import Serving
from xquant_vllm.scheme.factor_header import FactorHeader
from xquant_vllm.scheme.formats import LayerFormat, layer_formats
from xquant_vllm.scheme.settings import XQuantSettings


def kind_of(header: FactorHeader) -> Kind:
    """The row of a plan that calibrated factors belong to; their bits are built in."""
    assert header.settings.bits is not None
    method = CHAIN if header.settings.chain is not None else JOINT if header.settings.basis == "joint" else HEAD
    return Kind(method, header.settings.bits.key, True)


def folder_losses(files: ModelFiles, header: FactorHeader) -> Losses | None:
    """What was measured of calibrated factors; None where nothing was.

    Args:
        files: the folder.
        header: its.
    """
    if header.certificate is None:
        return None
    return certified_losses(files.name, kind_of(header), header.certificate)


def folder_formats(
    settings: XQuantSettings, header: FactorHeader, model: PlannedModel, serving: Serving
) -> tuple[LayerFormat, ...]:
    """The formats of a rank's layers.

    Args:
        settings: those that the folder is served with.
        header: of the folder, with its bits shared out.
        model: the model.
        serving: how it is served.
    """
    heads = slice(model.kv_heads_of_rank(serving.ranks))
    allocations = {layer: header.allocation_of(layer, heads) or () for layer in range(model.layers)}
    return layer_formats(settings, layer_shapes(model, serving.ranks), allocations)
