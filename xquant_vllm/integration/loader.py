"""The hook that factorizes a model's weights once they are loaded."""

import logging
import time
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader import base_loader
from vllm.model_executor.models.utils import extract_layer_index

from xquant_vllm.attention import dispatch, reference
from xquant_vllm.integration.cache_spec import publish_page_size
from xquant_vllm.integration.checks import UnsupportedError
from xquant_vllm.integration.coverage import describe_coverage
from xquant_vllm.integration.effective_weight import effective_linear
from xquant_vllm.integration.formats import stream_formats
from xquant_vllm.integration.modules import DenseLinear
from xquant_vllm.integration.recognize import recognize
from xquant_vllm.integration.registration import BACKEND_NAME
from xquant_vllm.integration.settings import PerStream
from xquant_vllm.integration.surgery import operate

logger = logging.getLogger("vllm.xquant_vllm")

_HOOKED = "_xquant_hooked"


def install_loader_hook() -> None:
    """Wrap vLLM's post-processing of loaded weights, once per process; called when the first layer is built.

    It is the last moment at which the weights are there and the quantization methods have not repacked them.
    """
    original = base_loader.process_weights_after_loading
    if getattr(original, _HOOKED, False):
        return

    def process_weights_after_loading(model: Any, model_config: Any, target_device: torch.device) -> None:
        layers = _xquant_layers(model)
        start = time.perf_counter()
        quantized = _factorize(layers, before_processing=True)
        seconds = time.perf_counter() - start
        original(model, model_config, target_device)
        start = time.perf_counter()
        _factorize(quantized, before_processing=False)
        if layers:
            model.load_weights = _refuse_new_weights
            _report(layers, len(quantized), seconds + time.perf_counter() - start)
            logger.info("xquant: %s", describe_coverage(model))

    setattr(process_weights_after_loading, _HOOKED, True)
    base_loader.process_weights_after_loading = process_weights_after_loading


def _xquant_layers(model: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    """All attention layers of this backend as (name of the owner, owner, attention); refuse layers that escaped it."""
    from xquant_vllm.integration.impl import XQuantImpl  # which installs this hook, so it cannot be imported above

    attentions = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    layers, escaped = [], []
    for name, attention in attentions:
        if isinstance(attention.impl, XQuantImpl):
            owner_name = name.rpartition(".")[0]
            layers.append((owner_name, model.get_submodule(owner_name), attention))
        else:
            escaped.append((name, attention))
    if layers and escaped:
        config = layers[0][2].impl.vllm_config.attention_config
        if not config.backend_per_kind:
            name, attention = escaped[0]
            raise UnsupportedError(
                f"xquant: {name} was given the backend {attention.attn_backend.get_name()} although {BACKEND_NAME} was "
                "asked for; choose another --attention-backend for this model"
            )
    return layers


def _refuse_new_weights(*_: Any, **__: Any) -> None:
    """Stands in for ``load_weights`` of a model whose weights are factorized."""
    raise RuntimeError(
        "xquant: new weights cannot be loaded into a running model, because the key and value projections are "
        "factorized; start the server anew with them"
    )


def _factorize(
    layers: list[tuple[str, nn.Module, Any]], *, before_processing: bool
) -> list[tuple[str, nn.Module, Any]]:
    """Operate on the layers whose weights are readable at this moment; return the others."""
    unreadable = []
    for name, owner, attention in layers:
        parts = recognize(name, owner, attention)
        qkv_proj = parts.qkv_proj
        plain = isinstance(getattr(qkv_proj, "quant_method", None), UnquantizedLinearMethod)
        if before_processing and not plain:
            unreadable.append((name, owner, attention))
            continue
        if plain:
            bias = getattr(qkv_proj, "bias", None)
            dense = DenseLinear(qkv_proj.weight.data, None if bias is None else bias.data)
        else:
            dense = effective_linear(f"{name}.qkv_proj", qkv_proj)
        impl = attention.impl
        formats = stream_formats(
            impl.settings, extract_layer_index(attention.layer_name), attention.num_kv_heads, attention.head_size
        )
        impl.set_projection(operate(parts, impl.settings, dense), formats)
        publish_page_size(attention, formats)
    return unreadable


def _report(layers: list[tuple[str, nn.Module, Any]], quantized: int, seconds: float) -> None:
    """Say in the log what is cached, in how many bytes, and by which kernels it is read."""
    impl = layers[-1][2].impl
    settings, last = impl.settings, impl.formats
    bits = PerStream(key=last[0].bits, value=last[1].bits)
    xquant_bytes = sum(stream.bytes_per_token for _, _, layer in layers for stream in layer.impl.formats)
    plain_bytes = sum(4 * layer.num_kv_heads * layer.head_size for _, _, layer in layers)
    first = (
        f", the first {settings.first_layers} layers at {settings.bits_of_layer(0)}" if settings.first_layers else ""
    )
    logger.info(
        'xquant: cache "latent" at %s bits%s, groups of %d, basis "%s"; %d layers take %d bytes per token, 16-bit keys '
        "and values take %d (%.2fx); weights factorized in %.1f s",
        bits,
        first,
        last[0].group_size,
        settings.basis,
        len(layers),
        xquant_bytes,
        plain_bytes,
        plain_bytes / xquant_bytes,
        seconds,
    )
    if quantized:
        logger.info(
            "xquant: %d quantized qkv_proj layers now hold their effective weight in the model's dtype, because packed "
            "rows cannot be exchanged for down-projections; the other layers stay quantized",
            quantized,
        )
    device = impl.projection.up_key.device.type
    fast = dispatch.select(device) is not reference
    logger.log(logging.INFO if fast else logging.WARNING, "xquant: %s", dispatch.describe(device))
