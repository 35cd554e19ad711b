"""What is refused at start-up, by name, before a weight is loaded."""

from collections.abc import Iterator
from typing import Any

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.kivi.plugin.settings import layouts_of, settings_of
from xquant_vllm.plugin.checks import (
    SUPPORTED_CACHE_DTYPES,
    scheme_of_checkpoint,
    unsupported_features,
)
from xquant_vllm.plugin.connectors.allowed import any_connector
from xquant_vllm.plugin.drafts import WITHOUT_DRAFT_LAYERS, unsupported_speculation


def check_config(vllm_config: Any) -> None:
    """Refuse settings that cannot work and vLLM features that are not supported.

    Raises:
        SettingsError: a setting cannot work on this model.
        UnsupportedError: a feature is not supported; all such features are named, each with what to do.
    """
    settings = settings_of(vllm_config)
    problems = list(_unsupported(vllm_config, settings.pre_rope))
    if problems:
        raise UnsupportedError("\n".join(f"kivi: {problem}" for problem in problems))
    model = vllm_config.model_config
    if model is not None:
        num_kv_heads = model.get_num_kv_heads(vllm_config.parallel_config)
        layouts_of(vllm_config, settings, num_kv_heads, model.get_head_size())


def _unsupported(vllm_config: Any, pre_rope: bool) -> Iterator[str]:
    yield from unsupported_features(vllm_config, turns_keys=pre_rope, with_states=False)
    connector = any_connector(vllm_config)
    if connector is not None:
        yield f"{connector} is not supported: a sequence's last tokens are in pages of another kind; leave it out"
    yield from unsupported_speculation(vllm_config, WITHOUT_DRAFT_LAYERS)
    cache = vllm_config.cache_config
    if cache.cache_dtype not in SUPPORTED_CACHE_DTYPES and not scheme_of_checkpoint(vllm_config.model_config):
        yield (
            f"--kv-cache-dtype {cache.cache_dtype} names the format of cached keys and values, which this backend "
            'replaces; leave it out and set bits in --additional-config \'{"kivi": {"bits": 4}}\''
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield (
            "--disable-hybrid-kv-cache-manager would keep all tokens in 16 bit instead of the last ones; leave it out"
        )
    if vllm_config.attention_config.backend_per_kind:
        yield "backend_per_kind leaves some layers to another backend, which is not supported; leave it out"
    if vllm_config.load_config.load_format == "ipc_cache":
        yield "--load-format ipc_cache skips what is done once the weights are loaded; use auto"
    if pre_rope and vllm_config.lora_config is not None:
        yield "--enable-lora is not supported with pre_rope, whose keys leave the model early; merge the adapter"
