"""Where backends of this package get hold of a model whose weights have just been loaded."""

import functools
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.model_loader import base_loader

from xquant_vllm.plugin.attention_kinds import layer_problem, wrapper_problem
from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.drafts import is_draft
from xquant_vllm.plugin.ranks import check_neighbours
from xquant_vllm.plugin.refusals import announced
from xquant_vllm.plugin.registration import BACKENDS


def wrap_weight_processing(marker: str, process: Callable[[Callable[[], None], Any, Any], None]) -> None:
    """Wrap vLLM's post-processing of loaded weights, once per process.

    Args:
        marker: an attribute that tells that this has been done.
        process: called with vLLM's own post-processing, which it must call, the model, and its configuration.
    """
    original = base_loader.process_weights_after_loading
    if getattr(original, marker, False):
        return

    @functools.wraps(original)  # which keeps the markers of others
    @announced()
    def process_weights_after_loading(model: Any, model_config: Any, target_device: torch.device) -> None:
        check_neighbours(get_current_vllm_config())
        process(lambda: original(model, model_config, target_device), model, model_config)

    setattr(process_weights_after_loading, marker, True)
    base_loader.process_weights_after_loading = process_weights_after_loading


def backend_layers(model: nn.Module, backend_name: str, model_config: Any = None) -> list[tuple[str, nn.Module, Any]]:
    """All attention layers of this backend as (name of the owner, owner, attention).

    Args:
        model: the model.
        backend_name: the backend.
        model_config: the model's; None for that of the engine, which a draft does not have.

    Raises:
        UnsupportedError: one is of a kind that is not served, or layers escaped the backend although it was asked for
            all.
    """
    layers, escaped = [], []
    for name, attention in model.named_modules():
        if not isinstance(attention, AttentionLayerBase) or isinstance(attention, MambaBase):
            continue
        if getattr(getattr(attention, "impl", None), "backend_name", None) == backend_name:
            _check_kind(name, attention, backend_name)
            owner_name = name.rpartition(".")[0]
            layers.append((owner_name, model.get_submodule(owner_name), attention))
        else:
            escaped.append((name, attention))
    if escaped and _asked_for_all(backend_name, model_config):
        name, attention = escaped[0]
        raise unsupported_model(
            f"{name} ({type(attention).__name__}) was given the backend {_backend_of(attention)} although "
            f"{backend_name} was asked for",
            backend_name,
        )
    return layers


def _check_kind(name: str, attention: Any, backend_name: str) -> None:
    """Refuse what is built on vLLM's attention layer or on a backend of this package: it may rebase positions."""
    if type(attention) is not Attention:
        raise unsupported_model(f"{name} uses {layer_problem(type(attention))}, which is not supported", backend_name)
    if attention.attn_backend is not resolve_name(BACKENDS[backend_name].path):
        problem = wrapper_problem(attention.attn_backend.__name__)
        raise unsupported_model(f"{name} uses {problem}, which is not supported", backend_name)


def _asked_for_all(backend_name: str, model_config: Any) -> bool:
    """Whether the configuration of the model that is being loaded names a backend for all of its layers."""
    config = get_current_vllm_config()
    asked = config.attention_config
    backend = asked.backend
    # A draft is loaded while the engine's configuration is the current one, but does not get its backend.
    if model_config is not None and is_draft(config, model_config):
        backend = config.speculative_config.attention_backend
    return not asked.backend_per_kind and getattr(backend, "name", None) == backend_name


def _backend_of(attention: Any) -> str:
    backend = getattr(attention, "attn_backend", None)
    return "of its own" if backend is None else str(backend.get_name())
