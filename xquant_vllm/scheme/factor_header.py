"""The JSON header of a folder's factors: what they are made from, how, and which settings they are for."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.errors import FactorFileError
from xquant_vllm.projection.basis import BasisKind
from xquant_vllm.projection.factor_file import DTYPES, FORMAT_VERSION, HEADER_FILE, read_json, refuse_other_than_files
from xquant_vllm.projection.layer import BasisSpec
from xquant_vllm.projection.predicted import joint_kv_width
from xquant_vllm.scheme.certificate import Certificate, StrictModel
from xquant_vllm.scheme.settings import PerStream

logger = logging.getLogger("vllm.xquant_vllm")


class Source(StrictModel):
    """The checkpoint's shape.

    Attributes:
        architecture: name of its architecture.
        layers: attention layers.
        hidden_size: width of a layer's input.
        kv_heads: kv heads of every layer.
        head_size: channels of a head.
        fingerprints: per layer and kv head, see :func:`xquant_vllm.projection.factor_file.head_fingerprints`.
    """

    architecture: str
    layers: int
    hidden_size: int
    kv_heads: int
    head_size: int
    fingerprints: list[list[str]]


class Calibration(StrictModel):
    """The text that calibrated the bases.

    Attributes:
        text: a name in :data:`xquant_vllm.scheme.calibration.texts.BUILT_IN`, or a file's name without its folders.
        tokens: how many tokens of it were read.
        ridge: see :data:`xquant_vllm.projection.calibration.INPUT_RIDGE`.
        gradient_ridge: see :data:`xquant_vllm.projection.calibration.GRADIENT_RIDGE`.
    """

    text: str
    tokens: int
    ridge: float
    gradient_ridge: float


class ChainSettings(StrictModel):
    """Settings that are built into a predicted chain: a layer is fitted to what the layers before it read back."""

    first_layers: int
    anchor_interval: int


class FactorSettings(StrictModel):
    """Settings that the factors are for.

    Attributes:
        bits: a default; built in where the factors are calibrated.
        basis: of latents.
        rotate: of data-free factors.
        outlier_channels: of data-free factors.
        allocation: of calibrated factors, per layer, stream and latent head, bits and number of channels.
        chain: of calibrated factors for method ``"xquant-cl"``; None for layers by themselves.
    """

    bits: PerStream | None
    basis: Literal["head", "joint"]
    rotate: bool
    outlier_channels: PerStream
    allocation: list[list[list[list[tuple[int, int]]]]] | None = None
    chain: ChainSettings | None = None


class FactorHeader(StrictModel):
    """The whole header.

    Attributes:
        format: version of the format.
        package: version of the package that wrote it.
        source: what was factorized.
        settings: how, and the default bits.
        dtype: dtype of the down-projections, which is the one to serve in.
        calibration: None for data-free bases.
        certificate: what the cache loses on other text; None where it was not measured.
        checksums: SHA-256 of every tensor.
        checksum: SHA-256 of all else in this header, see :func:`header_checksum`; None in files of 0.1.0 and before.
    """

    format: int
    package: str
    source: Source
    settings: FactorSettings
    dtype: str
    calibration: Calibration | None
    certificate: Certificate | None = None
    checksums: dict[str, str]
    checksum: str | None = None

    @property
    def spec(self) -> BasisSpec:
        """What the bases are of which a layer has two."""
        kind: BasisKind = self.settings.basis
        outliers = self.settings.outlier_channels
        return BasisSpec(kind, outliers.key, outliers.value, self.settings.rotate, DTYPES[self.dtype])

    @property
    def joint_kv(self) -> bool:
        """Whether every layer has one calibrated latent for keys and values (and not a basis for each)."""
        return self.settings.allocation is not None and self.settings.basis == "joint"

    def allocation_of(self, layer: int, heads: slice) -> LayerAllocation | None:
        """Bits of a layer's channels for some kv heads; None where all channels have the same."""
        if self.settings.allocation is None:
            return None
        streams = self.settings.allocation[layer]
        # A latent for all kv heads is never cut.
        of_rank = streams if self.joint_kv else [stream[heads] for stream in streams]
        return tuple(tuple(tuple((bits, channels) for bits, channels in runs) for runs in stream) for stream in of_rank)


def read_header(folder: Path) -> FactorHeader | None:
    """The header of a folder's factors, or None if it has none.

    Raises:
        FactorFileError: it has one that cannot be used.
    """
    path = folder / HEADER_FILE
    if not os.path.lexists(path):
        return None
    refuse_other_than_files(path)
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4)  # read once per process, not once per layer
def _read(path: Path, _modified: int, _size: int) -> FactorHeader:
    content = read_json(path)
    if content.get("format") != FORMAT_VERSION:
        raise FactorFileError(
            f"has format version {content.get('format')!r}, this version of xquant-vllm reads {FORMAT_VERSION}"
        )
    try:
        header = _checked(FactorHeader.model_validate(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FactorFileError(f"is no header of factors ({where}: {first['msg']})") from None
    if content.get("checksum") is not None:
        if content["checksum"] != header_checksum(content):
            raise FactorFileError(
                "was changed: its checksum does not match, and what it says is built into the factors"
            )
    else:
        logger.warning("xquant: %s has no checksum of its settings, since an older release wrote it", path)
    return header


def header_checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a header but its own checksum, written as JSON with sorted names and without spaces."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _checked(header: FactorHeader) -> FactorHeader:
    """What the types alone do not say.

    Raises:
        FactorFileError: it is not said in one piece.
    """
    source = header.source
    if min(source.layers, source.hidden_size, source.kv_heads, source.head_size) < 1:
        raise FactorFileError("is no header of factors (source: sizes are at least 1)")
    if header.dtype not in DTYPES:
        raise FactorFileError(f"is no header of factors (dtype: {header.dtype!r})")
    of_layers = header.source.fingerprints
    # Not compared with a list of that many: a number in a file may be any.
    if len(of_layers) != source.layers or any(len(heads) != source.kv_heads for heads in of_layers):
        raise FactorFileError("is no header of factors (source.fingerprints: not one per layer and kv head)")
    allocation = header.settings.allocation
    if allocation is not None:
        latents = [1] if header.joint_kv else [header.source.kv_heads] * 2
        if [[len(stream) for stream in streams] for streams in allocation] != [latents] * header.source.layers:
            raise FactorFileError("is no header of factors (settings.allocation: not one per layer and latent head)")
        _check_runs(header)
    if allocation is not None and header.settings.bits is None:
        raise FactorFileError("is no header of factors (settings.bits: missing, but the factors are calibrated)")
    if header.settings.chain is not None and not header.joint_kv:
        raise FactorFileError(
            "is no header of factors (settings.chain: of factors that are no calibrated joint latents)"
        )
    return header


def _check_runs(header: FactorHeader) -> None:
    """Refuse bits and channels that no page holds."""
    source = header.source
    width = source.head_size
    if header.joint_kv:
        width = joint_kv_width(source.hidden_size, source.kv_heads, source.head_size)
    for layer in range(source.layers):
        try:
            for stream in header.allocation_of(layer, slice(None)) or ():
                AllocatedFormat(width, stream)
        except ValueError as error:
            raise FactorFileError(f"is no header of factors (settings.allocation: of layer {layer}: {error})") from None
