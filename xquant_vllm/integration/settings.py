"""The settings that users give as ``--additional-config '{"xquant": {...}}'``, checked once and frozen."""

import difflib
import json
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from xquant_vllm.codec.packing import SUPPORTED_BITS

CONFIG_KEY = "xquant"
# Overrides single settings in tests, as JSON. Users set --additional-config.
OVERRIDE_VARIABLE = "XQUANT_SETTINGS"


class SettingsError(ValueError):
    """A setting that cannot work; the message names it, its value, why, and what to set."""


class PerStream(BaseModel):
    """A number for key latents and one for value latents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: int
    value: int

    def __str__(self) -> str:
        return f"key {self.key} / value {self.value}"


def _refuse(why: str, instead: str) -> PydanticCustomError:
    return PydanticCustomError("xquant", "{why}; {instead}", {"why": why, "instead": instead})


def _check_bits(bits: PerStream | None) -> PerStream | None:
    if bits is not None:
        for stream, value in (("key", bits.key), ("value", bits.value)):
            if value not in SUPPORTED_BITS:
                raise _refuse(
                    f"no page format has {value}-bit codes ({stream})",
                    'set 8, 4, 3 or 2, or one for each as {"key": 4, "value": 2}',
                )
    return bits


class XQuantSettings(BaseModel):
    """Settings of the quantized cache.

    Attributes:
        bits: bits per cached number: 8, 4, 3 or 2; one for all or ``{"key": ..., "value": ...}``.
        group_size: channels that share a scale and a zero point; None takes the largest divisor of a latent head's
            width up to 128.
        first_layers: how many layers from the first on use ``first_layers_bits``.
        first_layers_bits: their bits; None takes ``bits``, but at least 4.
        outlier_channels: leading channels of every key latent head kept in FP16; ``{"key": ..., "value": ...}`` for
            both. A plain number speaks of keys: values have no outlier channel worth its bytes.
        rotate: rotate the other channels by a fixed orthogonal matrix, folded into the weights.
        basis: ``"head"`` for one latent basis per kv head (cheapest), ``"joint"`` for one for all (a little more
            accurate, much more arithmetic).
        factor_cache: keep computed factors in the user's cache, for the next start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: PerStream = PerStream(key=4, value=4)
    group_size: int | None = None
    first_layers: int = Field(default=0)
    first_layers_bits: PerStream | None = None
    outlier_channels: PerStream = PerStream(key=1, value=0)
    rotate: bool = True
    basis: Literal["head", "joint"] = "head"
    factor_cache: bool = True

    @field_validator("bits", "first_layers_bits", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, (Mapping, PerStream)) else {"key": value, "value": value}

    @field_validator("outlier_channels", mode="before")
    @classmethod
    def _of_keys(cls, value: Any) -> Any:
        return value if isinstance(value, (Mapping, PerStream)) else {"key": value, "value": 0}

    @field_validator("bits", "first_layers_bits")
    @classmethod
    def _supported_bits(cls, value: PerStream | None) -> PerStream | None:
        return _check_bits(value)

    @field_validator("group_size")
    @classmethod
    def _packable(cls, value: int | None) -> int | None:
        if value is not None and (value < 8 or value % 8):
            raise _refuse("a group is packed into whole bytes", "set a multiple of 8 such as 32, 64 or 128")
        return value

    @field_validator("first_layers")
    @classmethod
    def _counts_layers(cls, value: int) -> int:
        if value < 0:
            raise _refuse("it counts layers", "set 0 (none) or more")
        return value

    @field_validator("outlier_channels")
    @classmethod
    def _counts_channels(cls, value: PerStream) -> PerStream:
        if min(value.key, value.value) < 0:
            raise _refuse("it counts channels", "set 0 (none) or more; 1 suits every model tried")
        return value

    @model_validator(mode="after")
    def _first_layers_together(self) -> "XQuantSettings":
        if self.first_layers_bits is not None and self.first_layers == 0:
            raise _refuse(
                "first_layers_bits is set but first_layers is 0, so no layer would use it",
                "set first_layers to the number of layers, or leave first_layers_bits out",
            )
        return self

    def bits_of_layer(self, layer_index: int) -> PerStream:
        """Bits of a layer, counted from the model's first."""
        if layer_index >= self.first_layers:
            return self.bits
        if self.first_layers_bits is not None:
            return self.first_layers_bits
        return PerStream(key=max(4, self.bits.key), value=max(4, self.bits.value))


def parse_settings(raw: Mapping[str, Any] | None) -> XQuantSettings:
    """Check the user's settings.

    Args:
        raw: the value under ``"xquant"``, or None for the defaults.

    Raises:
        SettingsError: with one line per setting that cannot work.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise SettingsError(
            f"xquant: additional_config['{CONFIG_KEY}'] = {raw!r} is not a table of settings; "
            f'set for example --additional-config \'{{"xquant": {{"bits": 4}}}}\''
        )
    raw = {**raw, **_override()}
    try:
        return XQuantSettings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(problem, raw) for problem in error.errors())) from None


def settings_of(vllm_config: Any) -> XQuantSettings:
    """The settings in a vLLM configuration, over those that the model folder's factors were made for.

    Raises:
        SettingsError: a setting cannot work, the folder's factors cannot be used, or the two contradict each other.
    """
    additional = getattr(vllm_config, "additional_config", None)
    settings = parse_settings(additional.get(CONFIG_KEY) if isinstance(additional, Mapping) else None)
    from xquant_vllm.integration.factor_settings import over_factors  # which needs what is defined here

    return over_factors(settings, vllm_config)


def _override() -> Mapping[str, Any]:
    text = os.environ.get(OVERRIDE_VARIABLE)
    if not text:
        return {}
    try:
        override = json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"xquant: {OVERRIDE_VARIABLE} = {text!r} is not JSON ({error}); unset it") from None
    if not isinstance(override, Mapping):
        raise SettingsError(f"xquant: {OVERRIDE_VARIABLE} = {text!r} is not a JSON object; unset it")
    return override


def _explain(problem: Any, raw: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors."""
    names = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = list(XQuantSettings.model_fields) if len(names) == 1 else ["key", "value"]
        close = difflib.get_close_matches(names[-1], known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        where = "xquant: " if len(names) == 1 else f"xquant: setting {names[0]!r}: "
        return f"{where}unknown setting {names[-1]!r}; {hint}known are {', '.join(known)}"
    if not names:
        return f"xquant: {problem['msg']}"
    value: Any = raw.get(names[0])
    advice = {
        "bits": 'set 8, 4, 3 or 2, or {"key": 4, "value": 2}',
        "first_layers_bits": 'set 8, 4, 3 or 2, or {"key": 4, "value": 2}',
        "group_size": "set a multiple of 8 such as 64, or leave it out",
        "first_layers": "set a number of layers, 0 for none",
        "outlier_channels": 'set a number of channels, or {"key": 1, "value": 0}',
        "rotate": "set true or false",
        "basis": 'set "head" or "joint"',
        "factor_cache": "set true or false",
    }
    why = problem["msg"] if problem["type"] == "xquant" else f"{problem['msg']}; {advice[names[0]]}"
    return f"xquant: setting {'.'.join(names)!r}: {value!r} cannot work: {why}"
