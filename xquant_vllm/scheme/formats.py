"""From settings and the shapes of a model's layers to what every layer's pages hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.allocation import LayerAllocation
from xquant_vllm.codec.layout import Stream, StreamFormat
from xquant_vllm.codec.packing import UNQUANTIZED_BITS
from xquant_vllm.errors import SettingsError
from xquant_vllm.projection.basis import latent_shape
from xquant_vllm.projection.predicted import joint_kv_width
from xquant_vllm.scheme.settings import PerStream, XQuantSettings

_LARGEST_DEFAULT_GROUP = 128

Holds = Literal["latents", "x", "joint_kv"]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one attention layer.

    Attributes:
        index: the layer, counted from the model's first.
        hidden_size: channels of the layer input.
        num_kv_heads: kv heads on this rank.
        head_size: channels of a head.
        keys_normed_together: whether keys are normalized over all kv heads together (OLMo).
    """

    index: int
    hidden_size: int
    num_kv_heads: int
    head_size: int
    keys_normed_together: bool = False


@dataclass(frozen=True)
class LayerFormat:
    """What the pages of one layer hold.

    Attributes:
        shape: the layer's sizes.
        holds: ``"latents"``: latents of keys and of values, a stream each; ``"x"``: the rotated layer input, one stream
            for both; ``"joint_kv"``: one latent for keys and values together, one stream.
        streams: number formats.
        reads: positions (in the sequence of layers) of the earlier layers whose pages this one reads too, in order;
            they hold its prediction, and this layer's own pages the difference from it. Empty for a layer by itself.
    """

    shape: LayerShape
    holds: Holds
    streams: tuple[Stream, ...]
    reads: tuple[int, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's slot, everything counted."""
        return sum(stream.bytes_per_token for stream in self.streams)

    @property
    def plain_bytes_per_token(self) -> int:
        """Bytes that 16-bit keys and values take."""
        return 4 * self.shape.num_kv_heads * self.shape.head_size


def layer_formats(
    settings: XQuantSettings,
    shapes: Sequence[LayerShape],
    allocations: Mapping[int, LayerAllocation] | None = None,
) -> tuple[LayerFormat, ...]:
    """What the pages of a model's layers hold.

    Args:
        settings: the user's settings.
        shapes: the layers on this rank, in the order in which they run.
        allocations: of calibrated factors, by layer, for the kv heads on this rank; None without such factors.

    Raises:
        SettingsError: the settings do not fit the model.
    """
    formats: list[LayerFormat] = []
    for position, shape in enumerate(shapes):
        if allocations is not None:
            form = _allocated(shape, allocations[shape.index])
        else:
            # A layer cannot read what another rank of a pipeline has stored, so every rank's first is an anchor.
            form = _uniform(settings, shape, first_here=position == 0)
        filled = settings.for_chain("x" if form.holds == "x" else "latent")
        before = formats[-1] if formats else None
        reads: tuple[int, ...] = ()
        if settings.method == "xquant-cl" and before is not None and before.holds == form.holds:
            reads = () if filled.is_anchor(shape.index) else (*before.reads, position - 1)
        if shape.keys_normed_together and form.holds != "latents":
            raise _needs_latents_apart(settings, shape)
        formats.append(LayerFormat(shape, form.holds, form.streams, reads))
    return tuple(formats)


def _needs_latents_apart(settings: XQuantSettings, shape: LayerShape) -> SettingsError:
    """The error for what keys and values share, of a layer whose norm can only be in what keys do not share."""
    why = (
        f"cannot work on this model, which normalizes the keys of all heads together (layer {shape.index}): key "
        "latents are cached after that norm, so keys and values cannot share what is cached"
    )
    if settings.method == "xquant-cl":
        return SettingsError(f"xquant: setting 'method': 'xquant-cl' {why}; set \"method\": \"xquant\"")
    if settings.cache == "x":
        return SettingsError(f"xquant: setting 'cache': 'x' {why}; set \"cache\": \"latent\", or leave it out")
    return SettingsError(
        f"xquant: the calibrated factors in the model's folder, of joint latents, {why}; make them "
        "anew with xquant factorize --basis head, or leave them out"
    )


def _allocated(shape: LayerShape, allocation: LayerAllocation) -> LayerFormat:
    """Of calibrated factors: one latent for keys and values, or a stream of latents each."""
    if len(allocation) == 1:
        width = joint_kv_width(shape.hidden_size, shape.num_kv_heads, shape.head_size)
        return LayerFormat(shape, "joint_kv", (AllocatedFormat(width, allocation[0]),))
    return LayerFormat(shape, "latents", tuple(AllocatedFormat(shape.head_size, runs) for runs in allocation))


def _uniform(settings: XQuantSettings, shape: LayerShape, *, first_here: bool) -> LayerFormat:
    """Without calibration, and pages of X: the same bits in all channels."""
    holds = _holds(settings, shape)
    bits = settings.for_chain("x" if holds == "x" else "latent").bits_of_layer(shape.index, first_here=first_here)
    if holds != "latents" and bits.key != bits.value:
        which = "'method': 'xquant-cl'" if settings.method == "xquant-cl" else "'cache': 'x'"
        raise SettingsError(
            f"xquant: setting 'bits': {bits} cannot work with {which}, which caches one vector for keys and "
            "values: set one number of bits"
        )
    return LayerFormat(shape, holds, _streams(settings, shape, bits, holds))


def _holds(settings: XQuantSettings, shape: LayerShape) -> Holds:
    """What has fewer channels, if the user does not say."""
    latents: Holds = "latents" if settings.method == "xquant" else "joint_kv"
    if settings.cache is not None:
        return "x" if settings.cache == "x" else latents
    if shape.keys_normed_together:
        return latents
    bits = settings.bits_of_layer(shape.index)
    if latents == "latents" and bits.key != bits.value:
        return latents
    # Of two equally wide ones the one that is read faster: latents; but in a chain X, whose deltas are summed before
    # anything is multiplied.
    latent_channels = 2 * shape.num_kv_heads * shape.head_size
    narrower = shape.hidden_size < latent_channels
    if settings.method == "xquant-cl":
        narrower = shape.hidden_size <= latent_channels
    return "x" if narrower else latents


def _streams(settings: XQuantSettings, shape: LayerShape, bits: PerStream, holds: Holds) -> tuple[StreamFormat, ...]:
    outlier = settings.outlier_channels
    if holds == "x":
        # The rotation leaves no outliers.
        group_size = settings.group_size or _default_group_size("layer input", shape.hidden_size)
        return (_stream("layer input", 1, shape.hidden_size, group_size, bits.key, 0),)
    if holds == "joint_kv":
        width = shape.num_kv_heads * shape.head_size
        # Groups end where the values begin.
        group_size = settings.group_size or _default_group_size("joint latent", width)
        return (_stream("joint latent", 1, 2 * width, group_size, bits.key, outlier.key),)
    heads, width = latent_shape(shape.num_kv_heads, shape.head_size, settings.basis)
    what = f"latent head (basis {settings.basis!r})"
    group_size = settings.group_size or _default_group_size(what, width)
    return (
        _stream(what, heads, width, group_size, bits.key, outlier.key, "key"),
        _stream(what, heads, width, group_size, bits.value, outlier.value, "value"),
    )


def _stream(
    what: str, heads: int, width: int, group_size: int, bits: int, outliers: int, name: str = "key"
) -> StreamFormat:
    if width % group_size:
        raise SettingsError(
            f"xquant: setting 'group_size': {group_size} cannot work: it does not divide the {width} channels of a "
            f"{what}; set one of {_choices(width)}, or leave it out"
        )
    if outliers >= group_size:
        raise SettingsError(
            f"xquant: setting 'outlier_channels': {outliers} ({name}) cannot work: a group of {group_size} channels "
            f"would have nothing left to quantize; set 0 to {group_size - 1}, 1 suits every model tried"
        )
    return StreamFormat(heads, width, bits, group_size, 0 if bits == UNQUANTIZED_BITS else outliers)


def _choices(width: int) -> str:
    return ", ".join(str(size) for size in range(8, width + 1, 8) if width % size == 0)


def _default_group_size(what: str, width: int) -> int:
    sizes = [size for size in range(8, min(width, _LARGEST_DEFAULT_GROUP) + 1, 8) if width % size == 0]
    if not sizes:
        raise SettingsError(
            f"xquant: a {what} of {width} channels cannot be packed into whole bytes: it must be a multiple of 8; "
            "choose another --attention-backend for this model"
        )
    return sizes[-1]
