"""Attention modules of models that may or may not run through vLLM's Transformers backend."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.checks import OTHER_BACKEND
from xquant_vllm.plugin.load.recognize import AttentionParts, recognize

_BASE = ("vllm.model_executor.models.transformers.base", "Base")


def recognize_all(model: nn.Module, layers: Sequence[tuple[str, nn.Module, Any]]) -> list[AttentionParts]:
    """Read the parts of a model's attention modules, whether they are vLLM's code or that of transformers.

    Args:
        model: the model.
        layers: its attention layers as (name of the owner, owner, attention).

    Returns:
        The parts of each layer.

    Raises:
        UnsupportedError: a module is not built from known parts.
    """
    hosted = _hosted_parts(model, layers)
    return [hosted.get(layer[0]) or recognize(*layer) for layer in layers]


def _hosted_parts(model: nn.Module, layers: Sequence[tuple[str, nn.Module, Any]]) -> dict[str, AttentionParts]:
    """The parts of those that are code of transformers, by the names of the owners."""
    parts: dict[str, AttentionParts] = {}
    for name, base in model.named_modules():
        if not _is_base(base):
            continue
        inside = [layer for layer in layers if not name or layer[0].startswith(f"{name}.")]
        if inside:
            # Only then: that module of vLLM imports much.
            from xquant_vllm.plugin.load.transformers_backend.recognize import recognize_hosted

            parts |= recognize_hosted(base, inside)
    return parts


@contextmanager
def advising(model: nn.Module, vllm_config: Any) -> Iterator[None]:
    """Let the refusal of a model that runs through the Transformers backend tell of vLLM's own class, if there is one.

    Args:
        model: the model.
        vllm_config: its configuration.
    """
    try:
        yield
    except UnsupportedError as error:
        text = str(error)
        if OTHER_BACKEND not in text or not runs_through_transformers(model) or not _has_own_class(vllm_config):
            raise
        advice = f"set --model-impl vllm, which has code of its own for this model, or {OTHER_BACKEND}"
        raise UnsupportedError(text.replace(OTHER_BACKEND, advice)) from error


def runs_through_transformers(model: nn.Module) -> bool:
    """Whether a model, or part of it, is code of transformers with vLLM's layers in it."""
    return any(map(_is_base, model.modules()))


def _is_base(module: nn.Module) -> bool:
    return any((kind.__module__, kind.__name__) == _BASE for kind in type(module).__mro__)


def _has_own_class(vllm_config: Any) -> bool:
    """Whether vLLM has a class for the model beside the Transformers backend."""
    from vllm.model_executor.models.registry import ModelRegistry

    names = getattr(vllm_config.model_config.hf_config, "architectures", None) or ()
    modules = [getattr(ModelRegistry.models.get(name), "module_name", "") for name in names]
    return any(module and not module.endswith(".transformers") for module in modules)
