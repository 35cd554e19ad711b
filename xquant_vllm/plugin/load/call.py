"""Run attention modules with stand-ins for their children."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from xquant_vllm.plugin.checks import unsupported_model

_POSITIONS = ("positions", "position_ids")


def call_arguments(who: str, module: nn.Module, hidden_states: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """What an attention module's forward is called with, by the names of its parameters.

    Positions are told by vLLM's two names for them, and the layer input by ``hidden_states`` or by being the first
    parameter left that has no default. A residual, as of decoder layers that own their attention, is None as in the
    first layer.

    Args:
        who: the module's class and name, for errors.
        module: the module.
        hidden_states: ``[num_tokens, hidden_size]``.
        positions: ``[num_tokens]``.

    Raises:
        UnsupportedError: the forward takes arguments not known here.
    """
    parameters = inspect.signature(module.forward).parameters
    arguments: dict[str, Any] = {name: positions for name in _POSITIONS if name in parameters}
    required = [p.name for p in parameters.values() if p.name not in arguments and p.default is p.empty and p.kind < 2]
    if "residual" in required:
        required.remove("residual")
        arguments["residual"] = None
    hidden = "hidden_states" if "hidden_states" in parameters else next(iter(required), None)
    if hidden is None or set(required) - {hidden}:
        raise unsupported_model(f"{who} is not recognized: its forward takes {', '.join(parameters)}")
    return {**arguments, hidden: hidden_states}


def is_whole_layer(module: nn.Module) -> bool:
    """Whether an attention module is a decoder layer, with whatever follows attention in it."""
    return "residual" in inspect.signature(module.forward).parameters


def exchange(module: nn.Module, path: str, child: nn.Module) -> None:
    """Put ``child`` in the place of the descendant at ``path``."""
    parent, _, name = path.rpartition(".")
    module.get_submodule(parent)._modules[name] = child


@contextmanager
def exchanged(module: nn.Module, children: Mapping[str, nn.Module]) -> Iterator[None]:
    """Exchange descendants of a module, by their paths, for a while."""
    saved = {path: module.get_submodule(path) for path in children}
    try:
        for path, child in children.items():
            exchange(module, path, child)
        yield
    finally:
        for path, child in saved.items():
            exchange(module, path, child)
