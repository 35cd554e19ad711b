"""Reads one layer of a folder's factor file, checked against its header."""

from pathlib import Path

from xquant_vllm.errors import FactorFileError
from xquant_vllm.projection.basis import LatentBasis
from xquant_vllm.projection.factor_file import DTYPES, FACTORS_FILE, bases_from, layer_shapes, read_tensors
from xquant_vllm.projection.predicted import PredictedLink, link_shapes
from xquant_vllm.scheme.factor_conflicts import refuse_factors
from xquant_vllm.scheme.factor_header import FactorHeader

Bases = tuple[LatentBasis, LatentBasis]


def read_layer(folder: Path, index: int, header: FactorHeader) -> Bases:
    """Key basis and value basis of a layer, all kv heads of the model.

    Raises:
        SettingsError: the file is missing or corrupt.
    """
    source, spec = header.source, header.spec
    shapes = layer_shapes(index, source.hidden_size, source.kv_heads, source.head_size, spec.kind, spec.dtype)
    try:
        return bases_from(index, read_tensors(folder / FACTORS_FILE, shapes, header.checksums))
    except FactorFileError as error:
        raise refuse_factors(folder / FACTORS_FILE, str(error), header) from None


def joint_kv_name(layer: int, name: str) -> str:
    """Name of a tensor of a layer's calibrated joint latent."""
    return f"layers.{layer}.joint.{name}"


def read_link(folder: Path, index: int, layers_of_group: int, header: FactorHeader) -> PredictedLink:
    """A layer's calibrated joint latent.

    Args:
        folder: the model's folder.
        index: the layer, counted from the model's first.
        layers_of_group: layers of the chain's group so far, this one included.
        header: of the folder's factors.

    Raises:
        SettingsError: the file is missing or corrupt.
    """
    source = header.source
    shapes = link_shapes(source.hidden_size, source.kv_heads, source.head_size, layers_of_group, DTYPES[header.dtype])
    named = {joint_kv_name(index, name): form for name, form in shapes.items()}
    try:
        tensors = read_tensors(folder / FACTORS_FILE, named, header.checksums)
    except FactorFileError as error:
        raise refuse_factors(folder / FACTORS_FILE, str(error), header) from None
    return PredictedLink(
        tensors[joint_kv_name(index, "down")],
        tensors[joint_kv_name(index, "up_key")],
        tensors[joint_kv_name(index, "up_value")],
        tensors.get(joint_kv_name(index, "prediction")),
    )
