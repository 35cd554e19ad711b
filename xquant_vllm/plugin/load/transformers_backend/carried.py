"""What is put into a module of transformers, whose code calls its layers in another way than that of vLLM's models."""

from typing import Any

import torch
from torch import nn

from xquant_vllm.plugin.load.modules import whole_output
from xquant_vllm.plugin.load.transformers_backend.layouts import FusedLayout


class HostedProjection(nn.Module):
    """One projection of queries, keys and values, called as the code of transformers calls it.

    Attributes:
        projection: yields queries, and what is cached where it had keys and values.
        tp_size: 1; with ``output_sizes`` what vLLM's rewritten code of a module splits the output by.
        output_sizes: channels of what such code takes for queries, keys and values.
    """

    def __init__(self, projection: nn.Module, layout: FusedLayout, cached: int, *, carries: bool) -> None:
        """Wrap a projection.

        Args:
            projection: any that is called like one of vLLM's.
            layout: where the module's code looks for which part of the output.
            cached: channels of keys and values, or of what is cached in their place.
            carries: whether all of that takes the place of values.
        """
        super().__init__()
        self.projection = projection
        self.layout = layout
        self.carries = carries
        self.tp_size = 1
        of_keys, of_values = (layout.kv_size, cached) if carries else (cached // 2, cached // 2)
        self.output_sizes = [layout.q_size, of_keys, of_values]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project ``x`` ``[..., hidden_size]``; what comes out is where the module's code looks for it."""
        output = whole_output(self.projection, x)
        return self.layout.rearranged(output) if self.carries else output


class NoKeys(nn.Module):
    """In place of a projection of keys: zeros."""

    def __init__(self, kv_size: int) -> None:
        """Yield ``kv_size`` channels."""
        super().__init__()
        self.kv_size = kv_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros for ``x`` ``[..., hidden_size]``."""
        return x.new_zeros((*x.shape[:-1], self.kv_size))


class KeysAndValues(nn.Module):
    """In place of a projection of values: what is cached in place of keys, and behind it what is for values."""

    def __init__(self, key: nn.Module, value: nn.Module) -> None:
        """Wrap what yields both."""
        super().__init__()
        self.key, self.value = key, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project ``x`` ``[..., hidden_size]``."""
        return torch.cat((whole_output(self.key, x), whole_output(self.value, x)), -1)


class HostedLinear(nn.Module):
    """A stand-in for a layer, called as the code of transformers calls it.

    Attributes:
        tp_size: that of the layer; with ``output_sizes`` what vLLM's rewritten code of a module splits the output by.
        output_sizes: likewise.
    """

    def __init__(self, layer: nn.Module, like: Any) -> None:
        """Wrap what stands in for the layer ``like``."""
        super().__init__()
        self.layer = layer
        self.tp_size = getattr(like, "tp_size", 1)
        self.output_sizes = getattr(like, "output_sizes", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the stand-in makes of ``x`` ``[..., in]``."""
        return whole_output(self.layer, x)


class HostedAttentionLayer(nn.Module):
    """vLLM's attention layer behind a module of transformers.

    Attributes:
        attention: what is called.
        has_sink: whether there are attention sinks, which vLLM asks before it calls.
    """

    def __init__(self, attention: Any, has_sink: bool, q_size: int, carried: int) -> None:
        """Wrap a layer.

        Args:
            attention: the layer.
            has_sink: whether it has attention sinks.
            q_size: channels of the queries.
            carried: channels of keys and values that come in place of values; 0: both come as they are.
        """
        super().__init__()
        self.attention = attention
        self.has_sink = has_sink
        self.q_size = q_size
        self.carried = carried

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            query: ``[num_tokens, q_size]``, or more where there are heads for what is carried.
            key: ``[num_tokens, num_kv_heads * head_size]``; not looked at where it is carried.
            value: likewise, or ``[num_tokens, carried]``.

        Returns:
            What ``attention`` returns, ``[num_tokens, q_size]``.
        """
        if self.carried:
            query = query[..., : self.q_size]
            key, value = value[..., : self.carried].chunk(2, -1)
        return self.attention(query, key, value)
