"""See what an attention module hands to its ``attn``: the ground truth that surgery is checked against."""

import inspect
from typing import Any

import torch
from torch import nn

from xquant_vllm.integration.checks import unsupported_model


class _Reached(Exception):
    """Ends a forward pass at the attention call."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.qkv = (query, key, value)


class _Recorder(nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> None:
        raise _Reached(query.clone(), key.clone(), value.clone())


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
    known: dict[str, Any] = {"positions": positions, "hidden_states": hidden_states}
    parameters = inspect.signature(module.forward).parameters
    unknown = [p.name for p in parameters.values() if p.name not in known and p.default is p.empty and p.kind < 2]
    who = f"{type(module).__name__} at {name}"
    if unknown or "hidden_states" not in parameters:
        raise unsupported_model(f"{who} is not recognized: its forward takes {', '.join(parameters)}")
    children: dict[str, nn.Module] = {"attn": _Recorder()} | ({} if stand_in is None else {"qkv_proj": stand_in})
    saved = {key: module._modules[key] for key in children}
    module._modules.update(children)
    try:
        with torch.no_grad():
            module.forward(**{key: value for key, value in known.items() if key in parameters})
    except _Reached as reached:
        query, key, value = (x.flatten(1) for x in reached.qkv)
        return query, key, value
    except Exception as error:
        raise unsupported_model(
            f"{who} is not recognized: it fails before its `attn` ({type(error).__name__}: {error})"
        ) from error
    finally:
        module._modules.update(saved)
    raise unsupported_model(f"{who} is not recognized: it never called its `attn`")
