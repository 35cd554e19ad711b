"""The settings that users give as ``--additional-config '{"kivi": {...}}'``, checked once and frozen."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from xquant_vllm.codec.layout import BLOCK_SIZE_MULTIPLE
from xquant_vllm.errors import SettingsError
from xquant_vllm.kivi.block_sizes import choose_block_sizes
from xquant_vllm.kivi.pages import KIVI_BITS, QuantizedLayout, ResidualLayout
from xquant_vllm.scheme.setting_errors import refuse, validated

CONFIG_KEY = "kivi"

_GROUP_SIZE = 32  # as published
_PRE_ROPE_GROUP_SIZE = 128  # what the XQuant paper compares with
_BITS_ADVICE = f"set {' or '.join(map(str, KIVI_BITS))}"
_ADVICE = {
    "bits": _BITS_ADVICE,
    "group_size": "set a number of tokens such as 32",
    "residual": "set a number of tokens such as 128",
    "pre_rope": "set true or false",
    "prompt": 'set "exact" or "cached"',
}


class KiviSettings(BaseModel):
    """Settings of the cache.

    Attributes:
        bits: bits per cached number: 4 or 2.
        group_size: tokens of a key channel, and channels of a value head, that share a scale and a zero point; None
            takes 32, and 128 with ``pre_rope``. Value heads take the largest divisor of their size up to it.
        residual: R, how many recent tokens are kept as the model computed them; a multiple of ``group_size``.
        pre_rope: cache keys before RoPE and rotate them when they are read (KIVI*).
        prompt: ``"exact"``: queries see the tokens of their own step, so a prompt itself, exactly, as published;
            ``"cached"``: as the cache says, so that outputs do not depend on how prompts were cut.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int = 4
    group_size: int | None = None
    residual: int = 128
    pre_rope: bool = False
    prompt: Literal["exact", "cached"] = "exact"

    @field_validator("bits")
    @classmethod
    def _supported_bits(cls, value: int) -> int:
        if value not in KIVI_BITS:
            raise refuse(f"no page format has {value}-bit codes", _BITS_ADVICE)
        return value

    @field_validator("group_size")
    @classmethod
    def _readable(cls, value: int | None) -> int | None:
        if value is not None and (value <= 0 or value % BLOCK_SIZE_MULTIPLE):
            raise refuse(
                f"pages are read {BLOCK_SIZE_MULTIPLE} tokens at a time",
                f"set a multiple of {BLOCK_SIZE_MULTIPLE} such as 32, 64 or 128",
            )
        return value

    @model_validator(mode="after")
    def _together(self) -> "KiviSettings":
        if self.residual <= 0 or self.residual % self.tokens_per_group:
            raise refuse(
                f"residual is {self.residual}, but keys leave it in groups of {self.tokens_per_group}",
                f"set residual to a positive multiple of {self.tokens_per_group}",
            )
        return self

    @property
    def tokens_per_group(self) -> int:
        """Tokens of a key channel that share a scale and a zero point."""
        return self.group_size or (_PRE_ROPE_GROUP_SIZE if self.pre_rope else _GROUP_SIZE)

    def channels_per_group(self, head_size: int) -> int:
        """Channels of a value head that share a scale and a zero point."""
        fitting = [size for size in range(8, self.tokens_per_group + 1, 8) if head_size % size == 0]
        if not fitting:
            raise SettingsError(f"kivi: heads of {head_size} channels cannot be packed: they must be a multiple of 8")
        return fitting[-1]

    def layouts(
        self, num_kv_heads: int, head_size: int, dtype: torch.dtype, block_size: int | None
    ) -> tuple[QuantizedLayout, ResidualLayout]:
        """Layouts of a layer's pages.

        Args:
            num_kv_heads: kv heads of this rank.
            head_size: channels of a head.
            dtype: of the model.
            block_size: tokens of a quantized page if the user has set it.

        Raises:
            SettingsError: something does not fit.
        """
        group = self.tokens_per_group
        try:
            quantized = QuantizedLayout(
                num_kv_heads, head_size, self.bits, group, self.channels_per_group(head_size), group
            )
            residual = ResidualLayout(num_kv_heads, head_size, dtype, BLOCK_SIZE_MULTIPLE)
            return choose_block_sizes(quantized, residual, self.residual, block_size)
        except ValueError as error:
            raise SettingsError(str(error) if str(error).startswith("kivi:") else f"kivi: {error}") from None


def parse_settings(raw: Mapping[str, Any] | None) -> KiviSettings:
    """Check the user's settings.

    Args:
        raw: the value under ``"kivi"``, or None for the defaults.

    Raises:
        SettingsError: with one line per setting that cannot work.
    """
    return validated(raw, KiviSettings, CONFIG_KEY, _ADVICE)


def settings_of(vllm_config: Any) -> KiviSettings:
    """The settings in a vLLM configuration.

    Raises:
        SettingsError: a setting cannot work.
    """
    additional = getattr(vllm_config, "additional_config", None)
    return parse_settings(additional.get(CONFIG_KEY) if isinstance(additional, Mapping) else None)


def layouts_of(
    vllm_config: Any, settings: KiviSettings, num_kv_heads: int, head_size: int
) -> tuple[QuantizedLayout, ResidualLayout]:
    """Layouts of a layer's pages in a vLLM configuration.

    Raises:
        SettingsError: something does not fit.
    """
    cache = vllm_config.cache_config
    block_size = cache.block_size if cache.user_specified_block_size else None
    return settings.layouts(num_kv_heads, head_size, vllm_config.model_config.dtype, block_size)
