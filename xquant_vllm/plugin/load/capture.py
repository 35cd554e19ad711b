"""Run attention modules with stand-ins for their attention layer: the ground truth that surgery is checked against."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.call import call_arguments, exchanged

_NOTHING: Mapping[str, nn.Module] = {}


class _Reached(Exception):
    """Ends a forward pass at the attention call."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.qkv = (query, key, value)


class _Recorder(nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> None:
        raise _Reached(query.clone(), key.clone(), value.clone())


class _Answer(nn.Module):
    """Attention whose output is known."""

    def __init__(self, attended: torch.Tensor) -> None:
        super().__init__()
        self._attended = attended

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self._attended.clone()


@contextmanager
def _eagerly() -> Iterator[None]:
    """Without compiling what a model has compiled when it is first called: not worth it for these inputs."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def module_output(
    module: nn.Module,
    attention_child: str,
    hidden_states: torch.Tensor,
    positions: torch.Tensor,
    attended: torch.Tensor,
    stand_ins: Mapping[str, nn.Module],
) -> torch.Tensor:
    """Run an attention module whose attention layer answers with a given output.

    Args:
        module: an attention module that :func:`capture_qkv` has run.
        attention_child: name of its attention layer.
        hidden_states: ``[num_tokens, hidden_size]``.
        positions: ``[num_tokens]``.
        attended: the output of the attention layer, ``[num_tokens, num_heads * head_size]``.
        stand_ins: take the places of descendants at these paths.

    Returns:
        What the module returns, ``[num_tokens, hidden_size]``; the first of a pair whose second is None, or a bias to
        be added later.

    Raises:
        TypeError: it returns something else.
        Exception: whatever the module raises.
    """
    who = type(module).__name__
    arguments = call_arguments(who, module, hidden_states, positions)
    with exchanged(module, {attention_child: _Answer(attended), **stand_ins}), _eagerly():
        output = module.forward(**arguments)
    if isinstance(output, tuple) and len(output) == 2 and (output[1] is None or output[1].dim() == 1):
        output = output[0]
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"{who} returns {type(output).__name__}, not a tensor")
    return output


def capture_qkv(
    name: str,
    module: nn.Module,
    attention_child: str,
    hidden_states: torch.Tensor,
    positions: torch.Tensor,
    stand_ins: Mapping[str, nn.Module] = _NOTHING,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run an attention module up to the call of its attention layer.

    Args:
        name: the module's name, for errors.
        module: an attention module.
        attention_child: name of its attention layer.
        hidden_states: ``[num_tokens, hidden_size]``.
        positions: ``[num_tokens]``.
        stand_ins: take the places of descendants at these paths: linear layers whose own forward may not work before
            their weights are post-processed.

    Returns:
        The query, key and value arguments, ``[num_tokens, heads * head_size]`` each.

    Raises:
        UnsupportedError: the module's forward takes arguments not known here, fails, or never calls its attention.
    """
    who = f"{type(module).__name__} at {name}"
    arguments = call_arguments(who, module, hidden_states, positions)
    try:
        with exchanged(module, {attention_child: _Recorder(), **stand_ins}), _eagerly():
            module.forward(**arguments)
    except _Reached as reached:
        query, key, value = (x.flatten(1) for x in reached.qkv)
        return query, key, value
    except Exception as error:
        raise unsupported_model(
            f"{who} is not recognized: it fails before its `{attention_child}` ({type(error).__name__}: {error})"
        ) from error
    raise unsupported_model(f"{who} is not recognized: it never called its `{attention_child}`")
