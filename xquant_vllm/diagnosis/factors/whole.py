"""Whether a folder's factors are whole: every tensor of every layer, against its checksum."""

from pathlib import Path

import torch

from xquant_vllm.errors import FactorFileError, RefusedError, cause_of
from xquant_vllm.plugin.engine_factors import INDEX_FILE, index_problem
from xquant_vllm.projection.factor_file import (
    DTYPES,
    FACTORS_FILE,
    layer_shapes,
    read_tensors,
    refuse_other_than_files,
)
from xquant_vllm.projection.predicted import layers_of_groups, link_shapes
from xquant_vllm.scheme.factor_header import FactorHeader
from xquant_vllm.scheme.factor_reader import joint_kv_name
from xquant_vllm.scheme.settings import XQuantSettings

Forms = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def problems_of(folder: Path, header: FactorHeader, settings: XQuantSettings) -> list[str]:
    """A line for everything that is not as the header says; empty for factors that are whole.

    Args:
        folder: the folder.
        header: its header, which has been checked itself.
        settings: those that it is served with.

    Raises:
        RefusedError: the file of tensors cannot be read at all.
    """
    path, forms = folder / FACTORS_FILE, expected_forms(header, settings)
    there = _names(path)
    problems = []
    for name, form in forms.items():
        try:
            read_tensors(path, {name: form}, header.checksums)
        except FactorFileError as error:
            problems.append(f"{FACTORS_FILE} {error}")
    problems += [f"{FACTORS_FILE} has {name}, of which the header says nothing" for name in sorted(there - set(forms))]
    if problem := index_problem(folder):
        problems.append(f"{INDEX_FILE} {problem}")
    return problems


def expected_forms(header: FactorHeader, settings: XQuantSettings) -> Forms:
    """Dtypes and shapes of all tensors that a folder must have, by name.

    Args:
        header: of the folder.
        settings: those that it is served with.
    """
    source, spec, forms = header.source, header.spec, Forms()
    if not header.joint_kv:
        for layer in range(source.layers):
            forms |= layer_shapes(layer, source.hidden_size, source.kv_heads, source.head_size, spec.kind, spec.dtype)
        return forms
    chained = header.settings.chain is not None
    groups = layers_of_groups([not chained or settings.is_anchor(layer) for layer in range(source.layers)])
    for layer, count in enumerate(groups):
        shapes = link_shapes(source.hidden_size, source.kv_heads, source.head_size, count, DTYPES[header.dtype])
        forms |= {joint_kv_name(layer, name): form for name, form in shapes.items()}
    return forms


def _names(path: Path) -> set[str]:
    from safetensors import safe_open

    try:
        refuse_other_than_files(path)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return set(file.keys())
        except Exception as error:  # a header may claim anything, and the library answers with errors of several kinds
            raise FactorFileError(f"is truncated or no safetensors file ({cause_of(error)})") from None
    except FactorFileError as error:
        raise RefusedError(f"xquant: {path} {error}; make the folder anew, or copy it again") from None
