"""The hook that factorizes a model's weights once they are loaded."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.adapters import watch_adapters
from xquant_vllm.plugin.connectors.fingerprint import note_weights
from xquant_vllm.plugin.drafts import is_draft
from xquant_vllm.plugin.engine_factors import factor_provider
from xquant_vllm.plugin.load.cache_spec import publish_page_size, refuse_mixed_pages
from xquant_vllm.plugin.load.coverage import describe_coverage
from xquant_vllm.plugin.load.projections.effective_weight import effective_linear
from xquant_vllm.plugin.load.projections.rows import dense_stand_ins, is_plain, key_value_rows
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.plugin.load.report import load_notes, note
from xquant_vllm.plugin.load.rope.positions import keep_text_positions
from xquant_vllm.plugin.load.surgery import Surgeon
from xquant_vllm.plugin.load.trace.stand_ins import output_rows
from xquant_vllm.plugin.load.transformers_backend.find import advising, recognize_all, runs_through_transformers
from xquant_vllm.plugin.load.weight_hook import backend_layers, wrap_weight_processing
from xquant_vllm.plugin.registration import BACKEND_NAME, selected_backends
from xquant_vllm.plugin.reload.record import Record
from xquant_vllm.plugin.reload.session import serve_new_weights
from xquant_vllm.scheme.builder import layer_weights
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.layer_weights import refuse_non_finite

_HOOKED = "_xquant_hooked"

logger = logging.getLogger("vllm.xquant_vllm")


def install_loader_hook() -> None:
    """Wrap vLLM's post-processing of loaded weights, once per process; called when the first layer is built.

    It is the last moment at which the weights are there and the quantization methods have not repacked them.
    """
    wrap_weight_processing(_HOOKED, _process)


def _process(original: Callable[[], None], model: Any, model_config: Any) -> None:
    config, layers = get_current_vllm_config(), backend_layers(model, BACKEND_NAME, model_config)
    if layers:
        with advising(model, layers[0][2].impl.vllm_config):
            _factorize(original, model, layers)
    else:
        original()
    if is_draft(config, model_config):
        refuse_mixed_pages(config)
        if not layers:
            load_notes(config.compilation_config).remarks.append(f"of the draft, {describe_coverage(model)}")
    elif not layers:
        _warn_of_none(config, model)


def _warn_of_none(config: Any, model: nn.Module) -> None:
    """Say that no layer of a model is compressed, which asked for it; once, and not of a part of a pipeline."""
    asked = config.attention_config
    whole = config.parallel_config.rank == 0 and config.parallel_config.pipeline_parallel_size == 1
    if BACKEND_NAME in selected_backends(asked) and whole:
        kinds = ", ".join(f"{kind}: {backend.name}" for kind, backend in asked.backend_per_kind.items())
        logger.warning(
            "xquant: settings have no effect, because backend_per_kind (%s) leaves no layer of this model to the "
            "backend; %s",
            kinds,
            describe_coverage(model),
        )


def _factorize(original: Callable[[], None], model: Any, layers: list[tuple[str, nn.Module, Any]]) -> None:
    parts = recognize_all(model, layers)
    impl = layers[0][2].impl
    if impl.vllm_config.lora_config is not None:
        _refuse_adapters(model, parts)
    note_weights(impl.vllm_config, model)
    keep_text_positions(model, impl.vllm_config)
    factors = factor_provider(impl.vllm_config, impl.settings)
    # Packed weights cannot be read before they are processed. Layers may build on each other, so all of them wait.
    quantized = [child for part in parts for child, linear in part.sources.items() if not is_plain(linear)]
    processed = not all(is_plain(linear) for part in parts for linear in part.linears.values())
    if processed:
        original()
    owners = {name: owner for name, owner, _ in layers}
    record = Record(model, owners, impl.vllm_config, quantized=processed)
    start = time.perf_counter()
    _operate(layers, parts, factors, processed=processed)
    seconds = time.perf_counter() - start
    record.close([attention.impl for _, _, attention in layers], lambda: _operate_again(model))
    note_weights(impl.vllm_config, *(owner for _, owner, _ in layers))
    if not processed:
        original()
    serve_new_weights(model)
    if impl.vllm_config.lora_config is not None:
        watch_adapters()
    note([attention.impl for _, _, attention in layers], quantized, factors.describe(seconds), describe_coverage(model))


def _refuse_adapters(model: nn.Module, parts: list[AttentionParts]) -> None:
    """Refuse LoRA where adapters would not find the projection of queries."""
    instead = "adapters would not find it; leave it out, or merge the adapter into the checkpoint"
    quantized = [child for part in parts for child, linear in part.sources.items() if not is_plain(linear)]
    if quantized:
        raise UnsupportedError(
            f"xquant: --enable-lora is not supported with a quantized {quantized[0]}, which is replaced by its "
            f"effective weight: {instead}"
        )
    if runs_through_transformers(model):
        raise UnsupportedError(
            "xquant: --enable-lora is not supported with models that run through vLLM's Transformers backend, whose "
            f"{parts[0].key.child} is wrapped: {instead}"
        )


def _operate_again(model: Any) -> None:
    """Operate on a model that has new weights, and is otherwise as vLLM made it."""
    layers = backend_layers(model, BACKEND_NAME)
    impl = layers[0][2].impl
    parts = recognize_all(model, layers)
    _operate(layers, parts, factor_provider(impl.vllm_config, impl.settings), processed=False)


def _check_numbers(index: int, part: AttentionParts, projections: Mapping[str, Any]) -> None:
    """Refuse a layer whose keys or values are made with what is no number."""
    key, value = key_value_rows(part, projections)
    tensors: dict[str, torch.Tensor | None] = {
        _told(part, "k", "weight"): key,
        _told(part, "v", "weight"): value,
    }
    for letter, source in (("k", part.key), ("v", part.value)):
        bias = projections[source.child].bias
        tensors[_told(part, letter, "bias")] = None if bias is None else source.take(bias.data)
    norm = None if part.key_norm is None else part.key_norm.all_weights
    refuse_non_finite(index, {**tensors, f"{part.name}.{part.key_norm_child}.weight": norm})


def _told(part: AttentionParts, letter: str, tensor: str) -> str:
    """What a tensor is called in the checkpoint, where vLLM is known to have fused it, and in vLLM."""
    source, rows = {"k": (part.key, "key rows"), "v": (part.value, "value rows")}[letter]
    if source.child == "qkv_proj":
        return f"{part.name}.{letter}_proj.{tensor} (in vLLM the {rows} of qkv_proj)"
    whole = source.rows.numel() == output_rows(source.linear)
    return f"{part.name}.{source.child}.{tensor}" + ("" if whole else f" (its {rows})")


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
        LayerShape(
            index,
            part.key.linear.input_size,
            attention.num_kv_heads,
            attention.head_size,
            keys_normed_together=part.key_norm is not None and part.key_norm.channels is not None,
        )
        for index, part, (_, _, attention) in zip(indices, parts, layers, strict=True)
    ]
    settings = layers[0][2].impl.settings
    allocations = {shape.index: factors.allocation(shape.index, shape.num_kv_heads) for shape in shapes}
    known = {index: allocation for index, allocation in allocations.items() if allocation is not None}
    formats = layer_formats(settings, shapes, known if len(known) == len(shapes) else None)
    if not processed:
        # Before threads start with the first layers: LAPACK would have the last word.
        for index, part in zip(indices, parts, strict=True):
            _check_numbers(index, part, part.sources)
    surgeon = Surgeon(settings, formats, factors)
    with factors:
        if not processed:
            factors.announce(
                [
                    layer_weights(form, *key_value_rows(part, part.sources))
                    for form, part in zip(formats, parts, strict=True)
                    if form.holds != "x"
                ]
            )
        for position, (form, part, (name, _, attention)) in enumerate(zip(formats, parts, layers, strict=True)):
            if processed:
                dense = {path: effective_linear(f"{name}.{path}", linear) for path, linear in part.sources.items()}
                _check_numbers(form.shape.index, part, dense)
            else:
                dense = dense_stand_ins(part.sources)
            scheme = surgeon.operate(position, part, dense)
            attention.impl.set_scheme(scheme, [layers[index][2] for index in form.reads])
            publish_page_size(attention, form.bytes_per_token)
