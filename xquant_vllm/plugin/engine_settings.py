"""The settings in a vLLM configuration."""

from collections.abc import Mapping
from typing import Any

from xquant_vllm.attention.per_object import per_object
from xquant_vllm.plugin.engine_factors import factors_of
from xquant_vllm.scheme.factor_conflicts import over_factors
from xquant_vllm.scheme.settings import CONFIG_KEY, XQuantSettings, parse_settings


@per_object
def settings_of(vllm_config: Any) -> XQuantSettings:
    """The settings in a vLLM configuration, over those that the model folder's factors were made for; parsed once.

    With adapters (LoRA) layers keep rows for queries beside those of latents, and outputs are no latents: adapters of
    queries and of outputs are added to these.

    Raises:
        SettingsError: a setting cannot work, the folder's factors cannot be used, or the two contradict each other.
    """
    additional = getattr(vllm_config, "additional_config", None)
    settings = parse_settings(additional.get(CONFIG_KEY) if isinstance(additional, Mapping) else None)
    settings = over_factors(settings, *factors_of(vllm_config))
    if getattr(vllm_config, "lora_config", None) is None:
        return settings
    return settings.model_copy(update={"cache": settings.cache or "latent", "fold_values": False})


def forget_settings(vllm_config: Any) -> None:
    """Have settings parsed once more, because what they are laid over has changed."""
    settings_of.kept.pop(id(vllm_config), None)  # type: ignore[attr-defined]
