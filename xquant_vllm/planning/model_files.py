"""What a plan reads of a checkpoint: ``config.json`` and the headers of its safetensors files. No weight is read."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xquant_vllm.errors import RefusedError, cause_of
from xquant_vllm.offline.locate import hub_name, hub_refusal

_INDEX = "model.safetensors.index.json"
_PATTERN = "*.safetensors"
# Longer ones would be an attack, not a model: the safetensors library has the same limit.
_LONGEST_HEADER = 100_000_000
# Bits of a number, by its name in a header; others are taken for a byte.
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16, "U16": 16}


@dataclass(frozen=True)
class ModelFiles:
    """Of one checkpoint.

    Attributes:
        name: as the user gave it.
        folder: where it is; None on the hub.
        config: ``config.json``.
        shapes: of every tensor by name; None where there are no safetensors files.
        weight_bytes: what the tensors take, None likewise.
    """

    name: str
    folder: Path | None
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]] | None
    weight_bytes: int | None


def read_model(model: str) -> ModelFiles:
    """Read a checkpoint's configuration and headers.

    Args:
        model: a folder, or a name on the hub, of which nothing but these is fetched.

    Raises:
        RefusedError: there is no such model, or a file of it cannot be read.
    """
    here = read_model_here(model)
    return _from_hub(model) if here is None else here


def read_model_here(model: str) -> ModelFiles | None:
    """Read what needs no network; None of a model on the hub that was not fetched.

    Raises:
        RefusedError: as of :func:`read_model`.
    """
    folder = Path(model)
    if model and folder.is_dir():
        return _from_folder(model, folder)
    hub_name(model)
    cached = _cached_folder(model)
    return None if cached is None else _from_folder(model, cached)


def _from_folder(name: str, folder: Path) -> ModelFiles:
    config = _json(folder / "config.json")
    if not isinstance(config, dict):
        raise RefusedError(
            f"xquant: {folder} is no checkpoint: config.json is no table of settings; fetch the checkpoint anew"
        )
    files = _weight_files(folder)
    headers = [read_header(path) for path in files]
    return _files(name, folder, config, headers if files else None)


def _weight_files(folder: Path) -> list[Path]:
    """The model's own; a folder of factors has one more, which the index does not name."""
    if (folder / _INDEX).is_file():
        table = _json(folder / _INDEX)
        names = table.get("weight_map") if isinstance(table, dict) else None
        if isinstance(names, dict) and all(isinstance(file, str) for file in names.values()):
            return [folder / file for file in sorted(set(names.values()))]
        raise RefusedError(f"xquant: {folder / _INDEX} has no weight_map; fetch the checkpoint anew")
    return sorted(folder.glob(_PATTERN))


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: of every tensor ``dtype``, ``shape`` and ``data_offsets``.

    Raises:
        RefusedError: the file cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(file.read(length))
        if not isinstance(header, dict) or any(not isinstance(value, dict) for value in header.values()):
            raise ValueError("the header is no table of tensors")
        return header
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise RefusedError(
            f"xquant: {path} is truncated or no safetensors file ({cause_of(error)}); fetch the checkpoint anew"
        ) from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RefusedError(
            f"xquant: {path.parent} is no checkpoint: {path.name} cannot be read ({cause_of(error)}); name a folder "
            "with config.json and safetensors files"
        ) from None


def _cached_folder(name: str) -> Path | None:
    """The hub's cache of a whole model, which needs no network."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(name, "config.json")
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and any(folder.glob(_PATTERN)) else None


def _from_hub(name: str) -> ModelFiles:
    """Two small requests: the configuration as a file, and of the weights the first bytes of every file."""
    try:
        import huggingface_hub

        config = _json(Path(huggingface_hub.hf_hub_download(name, "config.json")))
        metadata = huggingface_hub.get_safetensors_metadata(name)
    except RefusedError:
        raise
    except Exception as error:  # the hub has many errors of its own
        raise hub_refusal(name, error) from None
    headers = [
        {tensor: {"dtype": info.dtype, "shape": info.shape} for tensor, info in file.tensors.items()}
        for file in metadata.files_metadata.values()
    ]
    return _files(name, None, config, headers)


def _files(
    name: str, folder: Path | None, config: Mapping[str, Any], headers: list[dict[str, Any]] | None
) -> ModelFiles:
    if headers is None:
        return ModelFiles(name, folder, config, None, None)
    tensors = {tensor: info for header in headers for tensor, info in header.items() if tensor != "__metadata__"}
    try:
        shapes = {tensor: tuple(int(size) for size in info["shape"]) for tensor, info in tensors.items()}
        weight_bytes = sum(_bytes(info["dtype"], shapes[tensor]) for tensor, info in tensors.items())
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(
            f"xquant: a safetensors header of {name} is damaged ({cause_of(error)}); fetch the checkpoint anew"
        ) from None
    return ModelFiles(name, folder, config, shapes, weight_bytes)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    numbers = 1
    for size in shape:
        numbers *= size
    return numbers * _BITS.get(dtype, 8) // 8
