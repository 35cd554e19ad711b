"""Run attention modules with stand-ins for their ``attn``: the ground truth that surgery is checked against."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from xquant_vllm.plugin.checks import unsupported_model


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
def _exchanged(module: nn.Module, children: Mapping[str, nn.Module]) -> Iterator[None]:
    saved = {name: module._modules[name] for name in children}
    module._modules.update(children)
    try:
        yield
    finally:
        module._modules.update(saved)


def _run(module: nn.Module, hidden_states: torch.Tensor, positions: torch.Tensor) -> Any:
    parameters = inspect.signature(module.forward).parameters
    known: dict[str, Any] = {"positions": positions, "hidden_states": hidden_states}
    with torch.no_grad():
        return module.forward(**{name: value for name, value in known.items() if name in parameters})


def module_output(
    module: nn.Module,
    hidden_states: torch.Tensor,
    positions: torch.Tensor,
    attended: torch.Tensor,
    stand_ins: Mapping[str, nn.Module],
) -> torch.Tensor:
    """Run an attention module whose ``attn`` answers with a given output.

    Args:
        module: an attention module that :func:`capture_qkv` has run.
        hidden_states: ``[num_tokens, hidden_size]``.
        positions: ``[num_tokens]``.
        attended: the output of its ``attn``, ``[num_tokens, num_heads * head_size]``.
        stand_ins: take the places of children of these names.

    Returns:
        What the module returns, ``[num_tokens, hidden_size]``.

    Raises:
        TypeError: it returns something else than a tensor.
        Exception: whatever the module raises.
    """
    with _exchanged(module, {"attn": _Answer(attended), **stand_ins}):
        output = _run(module, hidden_states, positions)
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"{type(module).__name__} returns {type(output).__name__}, not a tensor")
    return output


def capture_qkv(
    name: str,
    module: nn.Module,
    hidden_states: torch.Tensor,
    positions: torch.Tensor,
    stand_in: nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run an attention module up to its ``attn`` call.

    Args:
        name: the module's name, for errors.
        module: an attention module with children ``attn`` and ``qkv_proj``.
        hidden_states: ``[num_tokens, hidden_size]``.
        positions: ``[num_tokens]``.
        stand_in: takes the place of ``qkv_proj``, whose own forward may not work before its weights are post-processed.

    Returns:
        The query, key and value arguments, ``[num_tokens, heads * head_size]`` each.

    Raises:
        UnsupportedError: the module's forward takes arguments not known here, fails, or never calls ``attn``.
    """
    parameters = inspect.signature(module.forward).parameters
    known = ("positions", "hidden_states")
    unknown = [p.name for p in parameters.values() if p.name not in known and p.default is p.empty and p.kind < 2]
    who = f"{type(module).__name__} at {name}"
    if unknown or "hidden_states" not in parameters:
        raise unsupported_model(f"{who} is not recognized: its forward takes {', '.join(parameters)}")
    children: dict[str, nn.Module] = {"attn": _Recorder()} | ({} if stand_in is None else {"qkv_proj": stand_in})
    try:
        with _exchanged(module, children):
            _run(module, hidden_states, positions)
    except _Reached as reached:
        query, key, value = (x.flatten(1) for x in reached.qkv)
        return query, key, value
    except Exception as error:
        raise unsupported_model(
            f"{who} is not recognized: it fails before its `attn` ({type(error).__name__}: {error})"
        ) from error
    raise unsupported_model(f"{who} is not recognized: it never called its `attn`")
