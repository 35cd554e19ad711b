"""Files of factorized projections: safetensors with a checksum per tensor, and a JSON header beside or inside them.

A folder's factors are two files, ``xquant_factors.safetensors`` (``layers.N.key.down`` and so on) and
``xquant_factors.json`` (what they were made from and how). Both are written beside their place and renamed.
"""

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xquant_vllm.errors import FactorFileError, cause_of
from xquant_vllm.projection.basis import BasisKind, LatentBasis, latent_shape

FACTORS_FILE = "xquant_factors.safetensors"
HEADER_FILE = "xquant_factors.json"
# Changed whenever the same weights and settings give another basis, or the files another form.
FORMAT_VERSION = 2
# Of what a text's factors are fitted by: those that a server has kept of an earlier one are fitted again. Folders that
# `xquant factorize` wrote are served as they are.
CALIBRATION_VERSION = 3

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` and so on."""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, contiguous, little endian, on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def head_fingerprints(key_weight: torch.Tensor, value_weight: torch.Tensor, num_kv_heads: int) -> list[str]:
    """What tells the weights of every kv head from any other's.

    Args:
        key_weight: ``[num_kv_heads * head_size, hidden_size]`` in the serving dtype.
        value_weight: likewise.
        num_kv_heads: kv heads in these weights.

    Returns:
        Per head, 32 hexadecimal digits of the SHA-256 of shape, dtype and bytes of its key rows and value rows.
    """
    rows = key_weight.shape[0] // num_kv_heads
    fingerprints = []
    for head in range(num_kv_heads):
        digest = hashlib.sha256(f"{rows} {key_weight.shape[1]} {dtype_name(key_weight.dtype)}".encode())
        for weight in (key_weight, value_weight):
            digest.update(tensor_bytes(weight[head * rows : (head + 1) * rows]))
        fingerprints.append(digest.hexdigest()[:32])
    return fingerprints


def layer_tensors(layer: int, key: LatentBasis, value: LatentBasis) -> dict[str, torch.Tensor]:
    """The tensors of a layer's bases by the names they have in a file."""
    return {
        f"layers.{layer}.{stream}.{part}": tensor
        for stream, basis in (("key", key), ("value", value))
        for part, tensor in (("down", basis.down), ("up", basis.up))
    }


def layer_shapes(
    layer: int, hidden_size: int, num_kv_heads: int, head_size: int, kind: BasisKind, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of what :func:`layer_tensors` gives, by name."""
    latent_heads, width = latent_shape(num_kv_heads, head_size, kind)
    down = (dtype, (latent_heads, hidden_size, width))
    up = (torch.float32, (num_kv_heads, width, head_size))
    return {
        f"layers.{layer}.{stream}.{part}": form
        for stream in ("key", "value")
        for part, form in (("down", down), ("up", up))
    }


class TensorWriter:
    """Writes a safetensors file tensor by tensor, so that only one needs to be in memory."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Create the file.

        Args:
            path: where to write.
            shapes: dtype and shape of every tensor, in the order in which they will be written.
            metadata: strings for the file's header.
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, (dtype, shape) in shapes.items():
            size = dtype.itemsize * torch.Size(shape).numel()
            header[name] = {
                "dtype": _SAFETENSORS_DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._expected = list(shapes.items())[::-1]
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self.checksums: dict[str, str] = {}

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append the next tensors; they must be those announced."""
        for name, tensor in tensors.items():
            expected, (dtype, shape) = self._expected.pop()
            assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, dtype, shape)
            data = tensor_bytes(tensor)
            self.checksums[name] = hashlib.sha256(data).hexdigest()
            self._file.write(data)

    def close(self) -> None:
        """Flush to the disk."""
        assert not self._expected
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_tensors(
    path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], checksums: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Read tensors and check them.

    Args:
        path: a safetensors file.
        shapes: the tensors wanted, with the dtype and shape that they must have.
        checksums: SHA-256 of every tensor's bytes by name.

    Raises:
        FactorFileError: the file is missing, unreadable, truncated, lacks a tensor or was changed.
    """
    from safetensors import safe_open

    tensors = {}
    refuse_other_than_files(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            present = set(file.keys())
            for name, (dtype, shape) in shapes.items():
                if name not in present:
                    raise FactorFileError(f"has no tensor {name}")
                tensor = file.get_tensor(name)
                if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                    raise FactorFileError(
                        f"has {name} as {dtype_name(tensor.dtype)} {list(tensor.shape)}, expected "
                        f"{dtype_name(dtype)} {list(shape)}"
                    )
                if hashlib.sha256(tensor_bytes(tensor)).hexdigest() != checksums.get(name):
                    raise FactorFileError(f"is corrupt: the checksum of {name} does not match")
                tensors[name] = tensor
    except FactorFileError:
        raise
    except Exception as error:  # a header may claim anything, and the library answers with errors of several kinds
        raise FactorFileError(f"is truncated or no safetensors file ({cause_of(error)})") from None
    return tensors


def refuse_other_than_files(path: Path) -> None:
    """Refuse what cannot be read like a file: a pipe would never end.

    Raises:
        FactorFileError: it is missing, cannot be reached, or is no file.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FactorFileError("is a link to nothing" if path.is_symlink() else "is missing") from None
    except OSError as error:
        raise FactorFileError(f"cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise FactorFileError("is a folder" if stat.S_ISDIR(mode) else "is no regular file")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FactorFileError(f"has {twice!r} twice")
    return content


def _no_number(name: str) -> None:
    raise FactorFileError(f"has {name} where a number should be")


def bases_from(layer: int, tensors: Mapping[str, torch.Tensor]) -> tuple[LatentBasis, LatentBasis]:
    """Key and value basis from tensors named as by :func:`layer_tensors`."""
    key, value = (
        LatentBasis(tensors[f"layers.{layer}.{stream}.down"], tensors[f"layers.{layer}.{stream}.up"])
        for stream in ("key", "value")
    )
    return key, value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, and have it on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FactorFileError: it is missing, unreadable, no object, or ambiguous: a name twice, or a number that is none.
    """
    refuse_other_than_files(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_no_number)
    except FactorFileError:
        raise
    except OSError as error:
        raise FactorFileError(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise FactorFileError(f"is no JSON file ({cause_of(error)})") from None
    if not isinstance(content, dict):
        raise FactorFileError("is no JSON object")
    return content
