"""Where backends of this package get hold of a model whose weights have just been loaded."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import base_loader

from xquant_vllm.plugin.checks import unsupported_model


def wrap_weight_processing(marker: str, process: Callable[[Callable[[], None], Any], None]) -> None:
    """Wrap vLLM's post-processing of loaded weights, once per process.

    Args:
        marker: an attribute that tells that this has been done.
        process: called with vLLM's own post-processing, which it must call, and the model.
    """
    original = base_loader.process_weights_after_loading
    if getattr(original, marker, False):
        return

    @functools.wraps(original)  # which keeps the markers of others
    def process_weights_after_loading(model: Any, model_config: Any, target_device: torch.device) -> None:
        process(lambda: original(model, model_config, target_device), model)

    setattr(process_weights_after_loading, marker, True)
    base_loader.process_weights_after_loading = process_weights_after_loading


def backend_layers(model: nn.Module, backend_name: str) -> list[tuple[str, nn.Module, Any]]:
    """All attention layers of this backend as (name of the owner, owner, attention).

    Raises:
        UnsupportedError: other layers escaped the backend although it was asked for all.
    """
    attentions = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    layers, escaped = [], []
    for name, attention in attentions:
        if getattr(attention.impl, "backend_name", None) == backend_name:
            owner_name = name.rpartition(".")[0]
            layers.append((owner_name, model.get_submodule(owner_name), attention))
        else:
            escaped.append((name, attention))
    if layers and escaped:
        impl = layers[0][2].impl
        if not impl.vllm_config.attention_config.backend_per_kind:
            name, attention = escaped[0]
            raise unsupported_model(
                f"{name} was given the backend {attention.attn_backend.get_name()} although {impl.backend_name} was "
                "asked for",
                impl.backend_name,
            )
    return layers
