"""What is put into an attention module while tensors are followed through it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from xquant_vllm.plugin.load.modules import DenseLinear


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: vLLM's, or this package's in its place."""
    return isinstance(module, LinearBase | DenseLinear)


def output_rows(linear: Any) -> int:
    """Output rows of a linear layer on this rank."""
    return int(getattr(linear, "output_size_per_partition", linear.output_size))


def descendants(module: nn.Module, attention_child: str, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linear layers below a module, and what else is called as a whole, with their paths.

    Modules that have linear layers below them are looked into. The attention layer is left out.
    """
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path == attention_child:
            continue
        if not is_linear(child) and any(is_linear(part) for part in child.modules()):
            yield from descendants(child, attention_child, f"{path}.")
        else:
            yield path, child


class Coded(nn.Module):
    """Answers like a linear layer, with given numbers, and keeps what it was given.

    Attributes:
        given: the input, ``[..., input_size]``; None before the first call.
    """

    def __init__(self, path: str, linear: Any, codes: torch.Tensor) -> None:
        """Stand in for ``linear`` at ``path`` with codes ``[num_tokens, rows]``."""
        super().__init__()
        self._path, self._codes = path, codes
        self._apart = linear.skip_bias_add and linear.bias is not None
        self._pair = linear.return_bias
        self._width = getattr(linear, "input_size_per_partition", linear.input_size)
        self._gathers = getattr(linear, "gather_output", False) and linear.tp_size > 1
        self.given: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> Any:
        """Codes in the place of the output of ``x`` ``[..., input_size]``."""
        if x.shape[-1] != self._width:
            raise ValueError(f"`{self._path}` takes {self._width} channels and is given {x.shape[-1]}")
        if self._gathers:
            raise ValueError(f"`{self._path}` gathers its output from all tensor parallel ranks")
        self.given = x.clone()
        output = self._codes.to(x).reshape(*x.shape[:-1], -1).clone()
        if not self._pair:
            return output
        return output, torch.zeros_like(output).flatten(0, -2)[0] if self._apart else None


@dataclass(frozen=True)
class Visit:
    """A call of a module that is not a linear layer.

    Attributes:
        path: of the module.
        module: the module.
        given: the floating-point tensors that it was given, before it ran.
        positional: whether it was given integers, too.
    """

    path: str
    module: nn.Module
    given: tuple[torch.Tensor, ...]
    positional: bool


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[list[Visit]]:
    """Let modules hand on what they are given in place of what they make of it; yields their calls.

    A module runs, for the form of its answer: its n-th floating-point tensor is exchanged for the n-th that the module
    was given, if both have one shape.
    """
    visits: list[Visit] = []
    with ExitStack() as hooks:
        for module, path in {module: path for path, module in modules.items()}.items():
            note, hand_on = _hooks(path, visits)
            for handle in (
                module.register_forward_pre_hook(note, with_kwargs=True),
                module.register_forward_hook(hand_on, with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        yield visits


def _hooks(path: str, visits: list[Visit]) -> tuple[Callable[..., None], Callable[..., Any]]:
    given: tuple[torch.Tensor, ...] = ()

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal given
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        # Copies: some modules work in place.
        given = tuple(x.clone() for x in tensors if x.is_floating_point())
        visits.append(Visit(path, module, given, len(given) < len(tensors)))

    def hand_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        waiting = iter(given)

        def instead(answer: Any) -> Any:
            if type(answer) in (tuple, list):
                return type(answer)([instead(part) for part in answer])
            if not isinstance(answer, torch.Tensor) or not answer.is_floating_point():
                return answer
            tensor = next(waiting, answer)
            return tensor.clone() if tensor.shape == answer.shape else answer

        return instead(output)

    return note, hand_on
