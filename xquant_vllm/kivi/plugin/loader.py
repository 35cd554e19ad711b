"""What is done to a model once its weights are loaded: layers get their residuals, and tell what their pages take."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.kivi import dispatch
from xquant_vllm.kivi.plugin.cache_spec import publish_pages
from xquant_vllm.kivi.plugin.keys_before_rope import take_keys_before_rope
from xquant_vllm.kivi.plugin.residual import ResidualLayer
from xquant_vllm.plugin.load.rope.positions import keep_text_positions
from xquant_vllm.plugin.load.transformers_backend.find import runs_through_transformers
from xquant_vllm.plugin.load.weight_hook import backend_layers, wrap_weight_processing
from xquant_vllm.plugin.registration import KIVI_BACKEND_NAME

logger = logging.getLogger("vllm.xquant_vllm")

_HOOKED = "_kivi_hooked"


def install_loader_hook() -> None:
    """Wrap vLLM's post-processing of loaded weights, once per process; called when the first layer is built."""
    wrap_weight_processing(_HOOKED, _process)


def _process(original: Callable[[], None], model: nn.Module, model_config: Any) -> None:
    layers = backend_layers(model, KIVI_BACKEND_NAME, model_config)
    if layers and layers[0][2].impl.settings.pre_rope and runs_through_transformers(model):
        raise UnsupportedError(
            "kivi: setting 'pre_rope': true cannot work on a model that runs through vLLM's Transformers backend, "
            "whose code turns queries and keys in one; leave pre_rope out to cache keys after RoPE"
        )
    original()
    if layers and layers[0][2].impl.settings.pre_rope:
        keep_text_positions(model, layers[0][2].impl.vllm_config, KIVI_BACKEND_NAME)
    for name, owner, attention in layers:
        _prepare(name, owner, attention)
    if layers:
        _report([attention.impl for _, _, attention in layers])


def _prepare(name: str, owner: nn.Module, attention: Any) -> None:
    """Give a layer its residual."""
    impl = attention.impl
    rope = take_keys_before_rope(name, owner, attention) if impl.settings.pre_rope else None
    residual = f"{attention.layer_name}.residual"
    impl.set_residual(residual, rope)
    plan = impl.plan
    table = impl.vllm_config.compilation_config.static_forward_context
    table[residual] = ResidualLayer(plan.residual, plan.residual_tokens, plan.quantized.page_bytes)
    publish_pages(attention, plan.quantized)


def _report(impls: list[Any]) -> None:
    """Say what is cached, in how many bytes, and by which kernels it is read."""
    settings, quantized, residual = impls[0].settings, impls[0].plan.quantized, impls[0].plan.residual
    plain = sum(replace(impl.plan.residual, block_size=16).bytes_per_token for impl in impls)
    taken = sum(impl.plan.quantized.bytes_per_token for impl in impls)
    logger.info(
        "kivi: keys %s RoPE per channel in groups of %d tokens, values per token in groups of %d channels, at %d bits; "
        "%d layers take %d bytes per token%s instead of %d (%.2fx), in blocks of %d",
        "before" if settings.pre_rope else "after",
        quantized.key_group_size,
        quantized.value_group_size,
        quantized.bits,
        len(impls),
        taken,
        "" if impls[0].vllm_config.parallel_config.world_size == 1 else " on this rank",
        plain,
        plain / taken,
        quantized.block_size,
    )
    logger.info(
        "kivi: and the last %d tokens of every sequence %d bytes each, in blocks of %d that are padded by %.1f%%; a "
        "prompt's own tokens are attended %s",
        settings.residual,
        plain,
        residual.block_size,
        100 * (quantized.page_bytes / residual.page_bytes - 1),
        "exactly" if settings.prompt == "exact" else "as they are cached",
    )
    logger.warning("kivi: %s", dispatch.describe(impls[0].vllm_config.device_config.device_type))
