"""Where factors are kept that a server's first start calibrates: a folder per model, text and format, beside the cache.

A folder's name is a SHA-256 of all that decides what is in it. It takes its name when it is whole.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xquant_vllm.errors import RefusedError, cause_of
from xquant_vllm.projection.factor_file import CALIBRATION_VERSION, FACTORS_FILE, FORMAT_VERSION, HEADER_FILE
from xquant_vllm.scheme.calibration.kept import KEPT_ROOM
from xquant_vllm.scheme.calibration.texts import text_digest
from xquant_vllm.scheme.factor_cache_folder import cache_folder

# Of every tensor, bytes that are looked at in each of a few places.
_LOOKED_AT, _PLACES = 4096, 4


@dataclass(frozen=True)
class CalibrationRequest:
    """Factors to calibrate.

    Attributes:
        model: folder of the checkpoint.
        text: a name in :data:`xquant_vllm.scheme.calibration.texts.BUILT_IN`, or a file.
        bits: 8, 4, 3 or 2.
        method: ``"xquant"`` or ``"xquant-cl"``.
        basis: ``"head"``, ``"joint"`` or None; see :class:`xquant_vllm.scheme.calibration.choice.CalibrationChoice`.
        dtype: to serve in.
        first_layers: with ``"xquant-cl"``; None for the default.
        anchor_interval: likewise.
    """

    model: str
    text: str
    bits: int
    method: str
    basis: str | None
    dtype: str
    first_layers: int | None = None
    anchor_interval: int | None = None

    def folder(self) -> Path | None:
        """Where its factors are kept; None for a user without a home.

        Raises:
            RefusedError: the model or the text cannot be read; the message is the reason alone.
        """
        root = cache_folder()
        if root is None:
            return None
        try:
            text = text_digest(self.text)
        except OSError as error:
            raise RefusedError(f"the file cannot be read ({error.strerror or error}); name a text file") from None
        content = {
            **dataclasses.asdict(self),
            "model": checkpoint_digest(Path(self.model)),
            "text": text,
            "format": FORMAT_VERSION,
            "fit": CALIBRATION_VERSION,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return root / KEPT_ROOM / digest[:32]


def is_kept(folder: Path) -> bool:
    """Whether a folder is one that a start has calibrated, and not a user's."""
    root = cache_folder()
    return root is not None and folder.parent == root / KEPT_ROOM


def is_whole(folder: Path) -> bool:
    """Whether a folder of kept factors is there."""
    return (folder / HEADER_FILE).is_file() and (folder / FACTORS_FILE).is_file()


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of what a checkpoint is: its configuration, tokenizer and tensors, wherever it lies.

    Of a tensor its name, dtype and shape count, and a few thousand of its bytes: all bytes of a large model would take
    minutes to read, and training changes all of them. Key and value weights are compared as a whole when they are
    served.

    Args:
        folder: of a safetensors checkpoint.

    Returns:
        Hexadecimal digits.

    Raises:
        RefusedError: it is none; the message is the reason alone.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + path.read_bytes())
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != FACTORS_FILE)
    try:
        found = [part for path in files for part in _looked_at(path)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise RefusedError(f"a file of weights in {folder} cannot be read ({cause_of(error)})") from None
    if not found:
        raise RefusedError(f"{folder} has no safetensors files")
    # Shards may be cut elsewhere.
    for part in sorted(found):
        digest.update(part)
    return digest.hexdigest()


def _looked_at(path: Path) -> Iterator[bytes]:
    """For every tensor of a file what it is, and bytes of it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is truncated")
        header: dict[str, Any] = json.loads(file.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            parts = [f"{name} {tensor['dtype']} {tensor['shape']}".encode()]
            for place in range(_PLACES):
                start = begin + (end - begin) * place // _PLACES
                file.seek(8 + length + start)
                parts.append(file.read(min(_LOOKED_AT, end - start)))
            yield b"\0".join(parts)
