"""The settings that users give as ``--additional-config '{"xquant": {...}}'``, checked once and frozen."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from xquant_vllm.codec.layout import UNIFORM_BITS
from xquant_vllm.codec.packing import UNQUANTIZED_BITS
from xquant_vllm.errors import SettingsError
from xquant_vllm.scheme import hot_share
from xquant_vllm.scheme.setting_errors import refuse, validated

CONFIG_KEY = "xquant"
# Settings that decide nothing about the factors that a folder has.
NOT_STORED = ("factor_cache", "fold_values", "prompt", "hot", "calibration", "quality_probe")

# First layers and anchor interval. For X the paper's choice (section 3.3): the first layers change most from one to the
# next, and a single base.
_CHAIN_DEFAULTS = {"x": (3, 0), "latent": (1, 4)}


_PROBE_ADVICE = "set a share of the calls of layers such as 0.001, or 0 for none"
_BITS_ADVICE = 'set 8, 4, 3 or 2, or {"key": 4, "value": 2}'
_CALIBRATION_ADVICE = 'set "auto", "none", "mixed-text", "python-docs", or the path of a text file'
_ADVICE = {
    "method": 'set "xquant" or "xquant-cl"',
    "bits": _BITS_ADVICE,
    "cache": 'set "x" or "latent", or leave it out',
    "first_layers_bits": _BITS_ADVICE,
    "anchor_bits": _BITS_ADVICE,
    "anchor_interval": "set a number of layers, 0 for a single chain, or leave it out",
    "skip_layers": "set a list of layers such as [0, 1]",
    "group_size": "set a multiple of 8 such as 64, or leave it out",
    "first_layers": "set a number of layers, 0 for none",
    "outlier_channels": 'set a number of channels, or {"key": 1, "value": 0}',
    "rotate": "set true or false",
    "basis": 'set "head" or "joint"',
    "factor_cache": "set true or false",
    "fold_values": "set true or false",
    "prompt": 'set "cached" or "exact"',
    "hot": hot_share.ADVICE,
    "quality_probe": _PROBE_ADVICE,
    "calibration": _CALIBRATION_ADVICE,
}


class PerStream(BaseModel):
    """A number for key latents and one for value latents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: int
    value: int

    def __str__(self) -> str:
        return f"key {self.key} / value {self.value}"


def _check_bits(bits: PerStream | None) -> PerStream | None:
    if bits is not None:
        for stream, value in (("key", bits.key), ("value", bits.value)):
            if value not in UNIFORM_BITS:
                raise refuse(
                    f"no page format has {value}-bit codes ({stream})",
                    'set 8, 4, 3 or 2 (or 16 for no quantization), or one for each as {"key": 4, "value": 2}',
                )
    return bits


class XQuantSettings(BaseModel):
    """Settings of the quantized cache.

    Attributes:
        method: ``"xquant"``, every layer by itself, or ``"xquant-cl"``, a layer as its difference from the one before.
        bits: bits per cached number: 8, 4, 3 or 2, or 16 for FP16; one for all or ``{"key": ..., "value": ...}``.
        cache: ``"latent"`` for latents of keys and values, ``"x"`` for the layer input itself, None for whichever has
            fewer channels, layer by layer.
        group_size: channels that share a scale and a zero point; None takes the largest divisor of a latent head's
            width up to 128.
        first_layers: how many layers from the first on use ``first_layers_bits``; None takes 0, but in a chain of X 3
            and in a chain of latents 1. There they are anchors, and the last of them is the base of the first group.
        first_layers_bits: bits of the first layers; None takes ``bits``, but at least 4.
        anchor_interval: with ``"xquant-cl"``, layers from one anchor to the next; 0 for a single chain to the end. None
            takes 0 for X, and 4 for latents, where a layer multiplies what all layers of its group have stored.
        anchor_bits: bits of the anchors after the first layers; None takes ``first_layers_bits``.
        skip_layers: layers that are not quantized (FP16), counted from 0.
        outlier_channels: leading channels of every key latent head kept in FP16; ``{"key": ..., "value": ...}`` for
            both. A plain number speaks of keys: values have no outlier channel worth its bytes.
        rotate: rotate the other channels by a fixed orthogonal matrix, folded into the weights.
        basis: ``"head"`` for one latent basis per kv head (cheapest), ``"joint"`` for one for all (a little more
            accurate, much more arithmetic).
        factor_cache: keep computed factors in the user's cache, for the next start.
        fold_values: multiply the up-projection of values into the output projection, where that is proved to change
            nothing but the rounding of its weights.
        prompt: ``"cached"``: all tokens are attended to as the cache holds them, so that outputs do not depend on how
            prompts were cut; ``"exact"``: tokens of a prompt see those of their own step as the model computed them.
        hot: memory for rematerialized keys and values of blocks in use: bytes (int or ``"2GiB"``), a share of the
            cache's memory (``"20%"`` or 0.2), or 0; None takes 0.2 for caches of the layer input, of joint latents and
            of chains on CPUs (:data:`~xquant_vllm.scheme.hot_share.DEFAULT_SHARE`), else 0.
        calibration: ``"auto"``: factors are calibrated at the first start where that loses less, on the text of this
            package (:func:`xquant_vllm.scheme.calibration.choice.choose_calibration`); ``"none"``: they are computed
            from the weights alone; else the text to calibrate on, a file (UTF-8), ``"mixed-text"`` or
            ``"python-docs"``. A model folder that has factors is served with these in any case.
        quality_probe: share of the calls of layers, from 0 to 1, in which keys and values that were read back are
            compared with exact ones; 0 for none. Changes no answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["xquant", "xquant-cl"] = "xquant"
    bits: PerStream = PerStream(key=4, value=4)
    cache: Literal["x", "latent"] | None = None
    group_size: int | None = None
    first_layers: int | None = None
    first_layers_bits: PerStream | None = None
    anchor_interval: int | None = None
    anchor_bits: PerStream | None = None
    skip_layers: tuple[int, ...] = ()
    outlier_channels: PerStream = PerStream(key=1, value=0)
    rotate: bool = True
    basis: Literal["head", "joint"] = "head"
    factor_cache: bool = True
    fold_values: bool = True
    prompt: Literal["cached", "exact"] = "cached"
    hot: int | float | None = None
    calibration: str = "auto"
    quality_probe: float = 0

    @field_validator("bits", "first_layers_bits", "anchor_bits", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, (Mapping, PerStream)) else {"key": value, "value": value}

    @field_validator("outlier_channels", mode="before")
    @classmethod
    def _of_keys(cls, value: Any) -> Any:
        return value if isinstance(value, (Mapping, PerStream)) else {"key": value, "value": 0}

    @field_validator("hot", mode="before")
    @classmethod
    def _amount(cls, value: Any) -> int | float | None:
        return hot_share.parse_share(value)

    @field_validator("quality_probe")
    @classmethod
    def _is_a_share(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise refuse("it is a share", _PROBE_ADVICE)
        return value

    @field_validator("calibration")
    @classmethod
    def _names_a_text(cls, value: str) -> str:
        if not value.strip():
            raise refuse("it names no text", _CALIBRATION_ADVICE)
        return value

    @field_validator("bits", "first_layers_bits", "anchor_bits")
    @classmethod
    def _supported_bits(cls, value: PerStream | None) -> PerStream | None:
        return _check_bits(value)

    @field_validator("group_size")
    @classmethod
    def _packable(cls, value: int | None) -> int | None:
        if value is not None and (value < 8 or value % 8):
            raise refuse("a group is packed into whole bytes", "set a multiple of 8 such as 32, 64 or 128")
        return value

    @field_validator("first_layers", "anchor_interval")
    @classmethod
    def _counts_layers(cls, value: int | None) -> int | None:
        if value is not None and value < 0:
            raise refuse("it counts layers", "set 0 (none) or more")
        return value

    @field_validator("skip_layers")
    @classmethod
    def _names_layers(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(index < 0 for index in value):
            raise refuse("layers are counted from 0", "set a list of numbers such as [0, 1]")
        return tuple(sorted(set(value)))

    @field_validator("outlier_channels")
    @classmethod
    def _counts_channels(cls, value: PerStream) -> PerStream:
        if min(value.key, value.value) < 0:
            raise refuse("it counts channels", "set 0 (none) or more; 1 suits every model tried")
        return value

    @model_validator(mode="after")
    def _together(self) -> "XQuantSettings":
        none_first = self.first_layers == 0 or (self.first_layers is None and self.method == "xquant")
        if self.first_layers_bits is not None and none_first:
            raise refuse(
                "first_layers_bits is set but first_layers is 0, so no layer would use it",
                "set first_layers to the number of layers, or leave first_layers_bits out",
            )
        if self.method == "xquant":
            for name, value in (("anchor_interval", self.anchor_interval), ("anchor_bits", self.anchor_bits)):
                if value:
                    raise refuse(
                        f"{name} is set but the method is 'xquant', whose layers do not build on each other",
                        f'set method to "xquant-cl", or leave {name} out',
                    )
        if self.anchor_bits is not None and self.anchor_interval == 0:
            raise refuse(
                "anchor_bits is set but anchor_interval is 0, so the only anchors are the first layers",
                "set anchor_interval, or first_layers_bits instead",
            )
        return self

    def for_chain(self, of: Literal["x", "latent"]) -> "XQuantSettings":
        """The settings with the defaults of a chain of X, or of latents, filled in; the same for ``"xquant"``.

        Raises:
            SettingsError: a setting has no use with these defaults.
        """
        if self.method == "xquant":
            return self
        first_layers, anchor_interval = _CHAIN_DEFAULTS[of]
        if self.anchor_bits is not None and self.anchor_interval is None and not anchor_interval:
            raise SettingsError(
                f"xquant: setting 'anchor_bits': {self.anchor_bits} cannot work: a chain of the layer input has no "
                "anchors but the first layers; set anchor_interval, or first_layers_bits instead"
            )
        return self.model_copy(
            update={
                "first_layers": first_layers if self.first_layers is None else self.first_layers,
                "anchor_interval": anchor_interval if self.anchor_interval is None else self.anchor_interval,
            }
        )

    @property
    def bits_of_first_layers(self) -> PerStream:
        """``first_layers_bits``, or its default."""
        if self.first_layers_bits is not None:
            return self.first_layers_bits
        return PerStream(key=max(4, self.bits.key), value=max(4, self.bits.value))

    def is_anchor(self, layer_index: int) -> bool:
        """Whether a layer of a chain, counted from the model's first, is stored by itself."""
        base = max(0, (self.first_layers or 0) - 1)
        if layer_index <= base or layer_index in self.skip_layers:
            return True
        return bool(self.anchor_interval) and (layer_index - base) % (self.anchor_interval or 1) == 0

    def bits_of_layer(self, layer_index: int, *, first_here: bool = False) -> PerStream:
        """Bits of a layer.

        Args:
            layer_index: the layer, counted from the model's first.
            first_here: whether it is the first on its rank: a chain begins there, whatever the layer's number.
        """
        if layer_index in self.skip_layers:
            return PerStream(key=UNQUANTIZED_BITS, value=UNQUANTIZED_BITS)
        if layer_index < (self.first_layers or 0):
            return self.bits_of_first_layers
        if self.method == "xquant-cl" and (first_here or self.is_anchor(layer_index)):
            return self.anchor_bits or self.bits_of_first_layers
        return self.bits


def parse_settings(raw: Mapping[str, Any] | None) -> XQuantSettings:
    """Check the user's settings.

    Args:
        raw: the value under ``"xquant"``, or None for the defaults.

    Raises:
        SettingsError: with one line per setting that cannot work.
    """
    return validated(raw, XQuantSettings, CONFIG_KEY, _ADVICE)
