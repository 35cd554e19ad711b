"""An attention module of transformers, made to look like one of vLLM's own to everything that operates on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xquant_vllm.plugin.load.transformers_backend.carried import (
    HostedAttentionLayer,
    HostedLinear,
    HostedProjection,
    KeysAndValues,
    NoKeys,
)
from xquant_vllm.plugin.load.transformers_backend.layouts import Apart, FusedLayout

if TYPE_CHECKING:
    from xquant_vllm.plugin.load.transformers_backend.calls import OwnerCall

# vLLM gives its attention layer this name in every such module.
ATTENTION = "attn"


@dataclass(frozen=True)
class Carrying:
    """How what is cached passes code that turns keys.

    Attributes:
        layout: where the module's code looks for keys and values.
        key: name of the linear layer that makes keys.
        value: the same of values.
        needed: whether the code does anything to keys.
    """

    layout: FusedLayout | Apart
    key: str
    value: str
    needed: bool


@dataclass(frozen=True)
class _Host:
    owner: nn.Module
    attention: Any
    call: "OwnerCall"
    children: dict[str, nn.Module | None]


class HostedAttention(nn.Module):
    """Called like vLLM's attention modules; runs a module of transformers.

    Its children are that module's. What is put in their place is called like the layers of vLLM's models, for as long
    as this is run as like those of transformers.

    Attributes:
        kv_size: channels of what its code takes for keys, which anybody may change.
    """

    def __init__(self, owner: nn.Module, attention: Any, call: "OwnerCall") -> None:
        """Stand before a module.

        Args:
            owner: the module; ``attention`` is its child.
            attention: vLLM's attention layer.
            call: how the model calls ``owner``.
        """
        super().__init__()
        # Not a child: the children are its own.
        self._host = _Host(owner, attention, call, dict(owner._modules))
        self._modules.update(owner._modules)
        self._carrying: Carrying | None = None
        self._detached, self._turning = False, True
        self.kv_size = attention.num_kv_heads * attention.head_size

    @property
    def owner(self) -> nn.Module:
        """The module that is run."""
        return self._host.owner

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> Any:
        """Run the module.

        Args:
            positions: ``[num_tokens]``.
            hidden_states: ``[num_tokens, hidden_size]``.

        Returns:
            What it returns for the tokens, ``[num_tokens, hidden_size]``.

        Raises:
            ValueError: the model gives it tensors of which nobody knows how they depend on the tokens.
        """
        args, kwargs = self._host.call.at(hidden_states, positions, turning=self._turning)
        children = self._host.owner._modules
        saved = dict(children)
        children.update(self._adapted())
        try:
            output = self._host.owner.forward(*args, **kwargs)
        finally:
            children.update(saved)
        if isinstance(output, tuple):
            output = output[0]
        return output[0] if isinstance(output, torch.Tensor) else output

    @contextmanager
    def turning_nothing(self) -> Iterator[None]:
        """Run it with position embeddings by which no key is turned, for as long as this lasts."""
        self._turning = False
        try:
            yield
        finally:
            self._turning = True

    def carry(self, carrying: Carrying) -> None:
        """Say how what is cached is to be carried, once keys are left alone."""
        self._carrying = carrying

    def leave_keys_alone(self) -> None:
        """From now on what is cached comes in place of keys and values, and is handed to attention as it is.

        The module gets the children that it is to be served with.
        """
        self._detached = self._carrying is not None and self._carrying.needed
        self._host.owner._modules.update(self._adapted())

    def _adapted(self) -> dict[str, nn.Module]:
        """What the module's code is to call in place of its own children, by name."""
        host, carrying = self._host, self._carrying
        heads, head_size = host.attention.num_kv_heads, host.attention.head_size
        # Whole heads of the layer input, where that is cached.
        cached = 2 * heads * head_size
        q_size, carried = host.attention.num_heads * head_size, cached if self._detached else 0
        sinks = bool(getattr(host.attention, "has_sink", False))
        adapted: dict[str, nn.Module] = {
            ATTENTION: HostedAttentionLayer(self._modules[ATTENTION], sinks, q_size, carried)
        }
        for name, child in self._modules.items():
            if name != ATTENTION and child is not None and child is not host.children[name]:
                adapted[name] = HostedLinear(child, host.children[name])
        if carrying is None:
            return adapted
        key, value = (self.get_submodule(name) for name in (carrying.key, carrying.value))
        if not isinstance(carrying.layout, Apart):
            adapted[carrying.key] = HostedProjection(key, carrying.layout, cached, carries=self._detached)
        elif self._detached:
            adapted |= {carrying.key: NoKeys(carrying.layout.kv_size), carrying.value: KeysAndValues(key, value)}
        return adapted


def stand_before(owner: nn.Module, attention: Any, call: "OwnerCall") -> HostedAttention:
    """A :class:`HostedAttention` whose class has the name of the module's class, for messages."""
    named = type(type(owner).__name__, (HostedAttention,), {})
    made: HostedAttention = named(owner, attention, call)
    return made
