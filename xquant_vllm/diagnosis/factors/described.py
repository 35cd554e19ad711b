"""From a folder of factors to facts about it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import Stream
from xquant_vllm.diagnosis.factors.whole import problems_of
from xquant_vllm.errors import FactorFileError, RefusedError
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE
from xquant_vllm.scheme.factor_conflicts import over_factors
from xquant_vllm.scheme.factor_header import FactorHeader, read_header
from xquant_vllm.scheme.formats import LayerFormat, LayerShape, layer_formats
from xquant_vllm.scheme.settings import XQuantSettings

SCHEMA = 1
"""Raised when a name of the object changes its meaning or goes; names may be added."""

_STREAMS = {"latents": ("keys", "values"), "joint_kv": ("keys and values",), "x": ("layer input",)}


def describe_factors(given: Path) -> dict[str, Any]:
    """What factors are of, how they were made, what they cost, and whether they are whole.

    Args:
        given: the folder, or one of its two files of factors.

    Returns:
        As JSON: ``schema``, ``folder``, ``model``, ``package``, ``format``, ``dtype``, ``method``, ``basis``, ``bits``,
        ``bits_built_in``, ``chain``, ``calibration``, ``certificate`` (see
        :class:`xquant_vllm.scheme.certificate.Certificate`; null where nothing was measured), ``layers``,
        ``bytes_per_token``, ``bytes_per_token_16bit``, ``header_checked`` (false for a header without a checksum, of an
        older release), ``tensors`` and ``problems``: a line for everything that is not whole. Bytes are those of one
        rank that serves all kv heads, with no settings but those of the folder.

    Raises:
        RefusedError: there are no factors, or they cannot be read.
    """
    folder = _folder(given)
    header = _header(folder)
    settings = over_factors(XQuantSettings(), folder, header)
    formats = _formats(header, settings)
    source, made_for = header.source, header.settings
    return {
        "schema": SCHEMA,
        "folder": str(folder),
        "model": source.model_dump(exclude={"fingerprints"}),
        "package": header.package,
        "format": header.format,
        "dtype": header.dtype,
        "method": settings.method,
        "basis": made_for.basis,
        "bits": settings.bits.model_dump(),
        "bits_built_in": made_for.allocation is not None,
        "chain": None if made_for.chain is None else made_for.chain.model_dump(),
        "calibration": None if header.calibration is None else header.calibration.model_dump(),
        "certificate": None if header.certificate is None else header.certificate.model_dump(),
        "layers": [_layer(form) for form in formats],
        "bytes_per_token": sum(form.bytes_per_token for form in formats),
        "bytes_per_token_16bit": sum(form.plain_bytes_per_token for form in formats),
        "header_checked": header.checksum is not None,
        "tensors": len(header.checksums),
        "problems": problems_of(folder, header, settings),
    }


def channel_bits(stream: Stream) -> list[float]:
    """Bits of every channel of a stream, mean over its heads; the most important channels of factors come first."""
    if isinstance(stream, AllocatedFormat):
        heads = []
        for runs in stream.runs:
            of_head = [bits for bits, channels in runs for _ in range(channels)]
            heads.append(of_head + [0] * (stream.width - len(of_head)))
        return [sum(of_channel) / len(heads) for of_channel in zip(*heads, strict=True)]
    exact = min(stream.outlier_channels, stream.width)
    return [16.0] * exact + [float(stream.bits)] * (stream.width - exact)


def _layer(form: LayerFormat) -> dict[str, Any]:
    return {
        "layer": form.shape.index,
        "holds": form.holds,
        "reads": list(form.reads),
        "streams": [
            {
                "of": name,
                "heads": stream.num_heads,
                "bits": _rounded(channel_bits(stream)),
                "bytes_per_token": stream.bytes_per_token,
            }
            for name, stream in zip(_STREAMS[form.holds], form.streams, strict=True)
        ],
        "bytes_per_token": form.bytes_per_token,
        "bytes_per_token_16bit": form.plain_bytes_per_token,
    }


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [round(number, 3) for number in numbers]


def _formats(header: FactorHeader, settings: XQuantSettings) -> tuple[LayerFormat, ...]:
    source, every = header.source, slice(None)
    shapes = [
        LayerShape(index, source.hidden_size, source.kv_heads, source.head_size) for index in range(source.layers)
    ]
    allocations = {shape.index: header.allocation_of(shape.index, every) for shape in shapes}
    known = {index: allocation for index, allocation in allocations.items() if allocation is not None}
    return layer_formats(settings, shapes, known or None)


def _folder(given: Path) -> Path:
    if given.name in (FACTORS_FILE, HEADER_FILE) and not given.is_dir():
        return given.parent
    if not given.exists():
        raise RefusedError(f"xquant: {given} is not there; give a folder that xquant factorize has written")
    if not given.is_dir():
        raise RefusedError(
            f"xquant: {given} is no folder, and no file of factors; give a folder that xquant factorize has written"
        )
    return given


def _header(folder: Path) -> FactorHeader:
    try:
        header = read_header(folder)
    except FactorFileError as error:
        raise RefusedError(f"xquant: {folder / HEADER_FILE} {error}; make the folder anew, or copy it again") from None
    if header is None:
        raise RefusedError(
            f"xquant: {folder} has no factors ({HEADER_FILE} is missing); make some with xquant factorize, or serve "
            "the model as it is"
        )
    return header
