"""How a model of transformers calls its attention modules: with which arguments, and from which position embeddings.

Whether a layer gets the angles of its kind of layer, another's or none at all is decided in the model's own code, so
that code is run, on a few tokens: all of it but the matrix products and attention, which answer with zeros.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import LinearBase


@dataclass(frozen=True, eq=False)
class RotaryCall:
    """A call of a module that made position embeddings.

    Attributes:
        module: the module.
        args: its arguments.
        kwargs: likewise, by name.
        positions: the one among them that has the positions, ``[1, num_tokens]``.
        output: what it returned.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    positions: torch.Tensor
    output: Any

    def at(self, positions: torch.Tensor, dtype: torch.dtype) -> Any:
        """Call it again.

        Args:
            positions: ``[num_tokens]``.
            dtype: of the hidden states that it is shown, which is that of its output.

        Returns:
            Likewise for these positions.
        """

        def exchange(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is self.positions:
                return positions.unsqueeze(0)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        with torch.no_grad():
            return self.module(*_mapped(self.args, exchange), **_mapped(self.kwargs, exchange))


@dataclass(frozen=True, eq=False)
class OwnerCall:
    """A call of an attention module.

    Attributes:
        args: its arguments.
        kwargs: likewise, by name.
        hidden: the one among them that is the layer input, ``[1, num_tokens, hidden_size]``.
        positions: those of the tokens ``[1, num_tokens]``, whether it is given them or not.
        rotary: calls whose output is among the arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden: torch.Tensor
    positions: torch.Tensor
    rotary: tuple[RotaryCall, ...]

    def at(
        self, hidden: torch.Tensor, positions: torch.Tensor, *, turning: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for other tokens.

        Args:
            hidden: ``[num_tokens, hidden_size]``.
            positions: ``[num_tokens]``.
            turning: False: with cosines of one and sines of zero, by which nothing is turned.

        Returns:
            Arguments by place and by name.

        Raises:
            ValueError: among the arguments is a tensor of which nobody knows how it depends on the tokens.
        """
        known: list[tuple[torch.Tensor, torch.Tensor]] = [(self.hidden, hidden.unsqueeze(0))]
        known.append((self.positions, positions.unsqueeze(0)))
        for call in self.rotary:
            made = list(_tensors(call.at(positions, hidden.dtype)))
            if not turning and len(made) == 2:
                made = [torch.ones_like(made[0]), torch.zeros_like(made[1])]
            known += zip(_tensors(call.output), made, strict=True)

        def exchange(tensor: torch.Tensor) -> torch.Tensor:
            for recorded, other in known:
                if tensor is recorded:
                    return other
            raise ValueError(f"it is given a tensor {tuple(tensor.shape)} that is neither its input nor made by RoPE")

        return _mapped(self.args, exchange), _mapped(dict(self.kwargs), exchange)


def record_calls(
    decoder: Any, owners: Iterable[nn.Module], hidden: torch.Tensor, positions: torch.Tensor
) -> dict[nn.Module, OwnerCall]:
    """Run a decoder, and note how it calls its attention modules.

    Args:
        decoder: the model between embedding and logits, a module of transformers with vLLM's layers in it.
        owners: its attention modules on this rank.
        hidden: what stands in for embedded tokens ``[num_tokens, hidden_size]``.
        positions: ``[num_tokens]``.

    Returns:
        The call of each module that was called.

    Raises:
        Exception: whatever the model's code raises.
    """
    owners = set(owners)
    rotary: list[RotaryCall] = []
    noted: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    given = positions.unsqueeze(0)

    def note_owner(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        noted[module] = (args, dict(kwargs))

    def note_embeddings(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if any(tensor is given for tensor in _tensors((args, kwargs))):
            rotary.append(RotaryCall(module, args, dict(kwargs), given, output))

    hooks = []
    for module in decoder.modules():
        if module in owners:
            hooks.append(module.register_forward_pre_hook(note_owner, with_kwargs=True))
        elif not any(True for _ in module.parameters()):
            hooks.append(module.register_forward_hook(note_embeddings, with_kwargs=True))
    decoder.eval()  # as vLLM does afterwards: dropout would be noise
    try:
        with _silenced(decoder), torch.no_grad():
            decoder.forward(inputs_embeds=hidden.unsqueeze(0), position_ids=given, use_cache=False, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {owner: _owner_call(args, kwargs, given, rotary) for owner, (args, kwargs) in noted.items()}


def _owner_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], positions: torch.Tensor, rotary: Sequence[RotaryCall]
) -> OwnerCall:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    given = list(_tensors((args, kwargs)))
    calls = [call for call in rotary if any(made is tensor for made in _tensors(call.output) for tensor in given)]
    return OwnerCall(args, kwargs, hidden, positions, tuple(calls))


@contextmanager
def _silenced(model: nn.Module) -> Iterator[None]:
    """Let everything in a model that multiplies by large matrices, or attends, answer with zeros.

    What vLLM has not processed yet cannot run, and none of it changes how attention modules are called.
    """
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules():
            answer = _answer(module)
            if answer is not None:
                changed.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = answer
        yield
    finally:
        for module, forward in changed:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _answer(module: Any) -> Callable[..., Any] | None:
    if isinstance(module, LinearBase):
        whole = getattr(module, "gather_output", False)
        width = module.output_size if whole else getattr(module, "output_size_per_partition", module.output_size)

        def linear(x: torch.Tensor, *_: Any, **__: Any) -> Any:
            output = x.new_zeros((*x.shape[:-1], width))
            return (output, None) if module.return_bias else output

        return linear
    if isinstance(module, MoERunner):
        return lambda x, *_, **__: torch.zeros_like(x)
    if isinstance(module, Attention):
        return lambda query, *_, **__: query.new_zeros((query.shape[0], module.num_heads * module.head_size_v))
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested arguments, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Nested arguments with every tensor exchanged."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(part, change) for name, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_mapped(part, change) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value
