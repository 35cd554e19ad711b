"""The hook that factorizes a model's weights once they are loaded."""

import logging
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.utils import extract_layer_index

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.adapters import watch_adapters
from xquant_vllm.plugin.engine_factors import factor_provider
from xquant_vllm.plugin.load.cache_spec import publish_page_size
from xquant_vllm.plugin.load.coverage import describe_coverage
from xquant_vllm.plugin.load.effective_weight import effective_linear
from xquant_vllm.plugin.load.modules import DenseLinear
from xquant_vllm.plugin.load.projections import key_value_rows
from xquant_vllm.plugin.load.recognize import AttentionParts, recognize
from xquant_vllm.plugin.load.report import report
from xquant_vllm.plugin.load.surgery import Surgeon
from xquant_vllm.plugin.load.weight_hook import backend_layers, wrap_weight_processing
from xquant_vllm.plugin.registration import BACKEND_NAME
from xquant_vllm.plugin.reload.record import Record
from xquant_vllm.plugin.reload.session import serve_new_weights
from xquant_vllm.scheme.builder import layer_weights
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.layer_weights import refuse_non_finite

logger = logging.getLogger("vllm.xquant_vllm")

_HOOKED = "_xquant_hooked"


def install_loader_hook() -> None:
    """Wrap vLLM's post-processing of loaded weights, once per process; called when the first layer is built.

    It is the last moment at which the weights are there and the quantization methods have not repacked them.
    """
    wrap_weight_processing(_HOOKED, _process)


def _process(original: Callable[[], None], model: Any) -> None:
    layers = backend_layers(model, BACKEND_NAME)
    if not layers:
        original()
        return
    parts = [recognize(*layer) for layer in layers]
    impl = layers[0][2].impl
    factors = factor_provider(impl.vllm_config, impl.settings)
    # Packed weights cannot be read before they are processed. Layers may build on each other, so all of them wait.
    quantized = sum(not _is_plain(part.qkv_proj) for part in parts)
    if quantized:
        if impl.vllm_config.lora_config is not None:
            raise UnsupportedError(
                "xquant: --enable-lora is not supported with a quantized qkv_proj, which is replaced by its effective "
                "weight: adapters would not find it; leave it out, or merge the adapter into the checkpoint"
            )
        original()
    owners = {name: owner for name, owner, _ in layers}
    record = Record(model, owners, impl.vllm_config, quantized=quantized > 0)
    start = time.perf_counter()
    _operate(layers, parts, factors, processed=quantized > 0)
    seconds = time.perf_counter() - start
    record.close([attention.impl for _, _, attention in layers], lambda: _operate_again(model))
    if not quantized:
        original()
    serve_new_weights(model)
    if impl.vllm_config.lora_config is not None:
        watch_adapters()
    report([attention.impl for _, _, attention in layers], quantized, factors.describe(seconds))
    logger.info("xquant: %s", describe_coverage(model))


def _operate_again(model: Any) -> None:
    """Operate on a model that has new weights, and is otherwise as vLLM made it."""
    layers = backend_layers(model, BACKEND_NAME)
    impl = layers[0][2].impl
    parts = [recognize(*layer) for layer in layers]
    _operate(layers, parts, factor_provider(impl.vllm_config, impl.settings), processed=False)


def _is_plain(qkv_proj: Any) -> bool:
    return isinstance(getattr(qkv_proj, "quant_method", None), UnquantizedLinearMethod)


def _check_numbers(index: int, part: AttentionParts, linear: Any) -> None:
    """Refuse a layer whose keys or values are made with what is no number."""
    key, value = key_value_rows(part, linear.weight.data)
    bias = getattr(linear, "bias", None)
    tensors = {
        f"{part.name}.k_proj.weight (in vLLM the key rows of qkv_proj)": key,
        f"{part.name}.v_proj.weight (in vLLM the value rows of qkv_proj)": value,
        f"{part.name}.k_proj.bias or v_proj.bias (in vLLM rows of qkv_proj)": None
        if bias is None
        else bias.data[part.q_size :],
        f"{part.name}.k_norm.weight": None if part.key_norm is None else part.key_norm.weight,
    }
    refuse_non_finite(index, tensors)


def _operate(
    layers: list[tuple[str, nn.Module, Any]], parts: list[AttentionParts], factors: FactorProvider, *, processed: bool
) -> None:
    """Operate on all layers, in order.

    Args:
        layers: the layers.
        parts: their parts.
        factors: gives the bases of latents.
        processed: whether vLLM has post-processed the weights; then layers are asked what they multiply by.
    """
    indices = [extract_layer_index(attention.layer_name) for _, _, attention in layers]
    shapes = [
        LayerShape(index, part.qkv_proj.input_size, attention.num_kv_heads, attention.head_size)
        for index, part, (_, _, attention) in zip(indices, parts, layers, strict=True)
    ]
    settings = layers[0][2].impl.settings
    allocations = {shape.index: factors.allocation(shape.index, shape.num_kv_heads) for shape in shapes}
    known = {index: allocation for index, allocation in allocations.items() if allocation is not None}
    formats = layer_formats(settings, shapes, known if len(known) == len(shapes) else None)
    if not processed:
        # Before threads start with the first layers: LAPACK would have the last word.
        for index, part in zip(indices, parts, strict=True):
            _check_numbers(index, part, part.qkv_proj)
    surgeon = Surgeon(settings, formats, factors)
    with factors:
        if not processed:
            factors.announce(
                [
                    layer_weights(form, *key_value_rows(part, part.qkv_proj.weight.data))
                    for form, part in zip(formats, parts, strict=True)
                    if form.holds != "x"
                ]
            )
        for position, (form, part, (name, _, attention)) in enumerate(zip(formats, parts, layers, strict=True)):
            if processed:
                dense = effective_linear(f"{name}.qkv_proj", part.qkv_proj)
                _check_numbers(form.shape.index, part, dense)
            else:
                bias = getattr(part.qkv_proj, "bias", None)
                dense = DenseLinear(part.qkv_proj.weight.data, None if bias is None else bias.data)
            scheme = surgeon.operate(position, part, dense)
            attention.impl.set_scheme(scheme, [layers[index][2] for index in form.reads])
            publish_page_size(attention, form.bytes_per_token)
