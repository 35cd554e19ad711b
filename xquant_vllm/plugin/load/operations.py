"""What surgery does to the projections of an attention module, for every kind of pages."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xquant_vllm.plugin.load.modules import DenseLinear, QueryAndInput
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.scheme.builder import LayerParameters
from xquant_vllm.scheme.formats import LayerFormat


@dataclass
class Operation:
    """One module under surgery.

    Attributes:
        parts: its parts.
        form: what its pages shall hold.
        dense: weight ``[q_size + 2 * kv_size, hidden_size]`` and bias of ``qkv_proj``.
        in_place: whether ``dense`` shares its memory with ``qkv_proj``, or shall replace it.
    """

    parts: AttentionParts
    form: LayerFormat
    dense: DenseLinear
    in_place: bool

    @property
    def parameters(self) -> LayerParameters:
        """What the module makes its keys and values with; the weights are not copied."""
        key, value = key_value_rows(self.parts, self.dense.weight.data)
        return LayerParameters(
            key=key,
            value=value,
            key_bias=self._bias_of(self.parts.q_size),
            value_bias=self._bias_of(self.parts.q_size + self.parts.kv_size),
            key_norm=self.parts.key_norm,
            rope=self.parts.rope,
        )

    def _bias_of(self, start: int) -> torch.Tensor | None:
        """Bias of key or value heads ``[num_kv_heads, head_size]``, FP32, a copy; None without."""
        shape = self.form.shape
        if self.dense.bias is None:
            return None
        rows = self.dense.bias.data[start : start + self.parts.kv_size]
        return rows.float().view(shape.num_kv_heads, shape.head_size).clone()

    def perform(self, down: torch.Tensor | None) -> nn.Module:
        """Replace the projections.

        Args:
            down: what takes the place of the key and value rows, ``[2 * kv_size, hidden_size]``; None to let the input
                through.

        Returns:
            What stands in for ``qkv_proj`` when it cannot run yet.
        """
        if down is None:
            return self._let_input_through()
        self.dense.weight.data[self.parts.q_size :] = down
        if self.dense.bias is not None:
            self.dense.bias.data[self.parts.q_size :] = 0
        if not self.in_place:
            self.parts.module.qkv_proj = self.dense
        return self.dense

    def _let_input_through(self) -> nn.Module:
        """Key and value rows go away."""
        parts, shape = self.parts, self.form.shape
        heads = -(-shape.hidden_size // shape.head_size)
        padding = heads * shape.head_size - shape.hidden_size
        queries = slice(0, parts.q_size)
        bias = None if self.dense.bias is None else self.dense.bias.data[queries].clone()
        dense = DenseLinear(self.dense.weight.data[queries].clone(), bias)
        query_proj: Any = dense
        if self.in_place:
            query_proj = parts.qkv_proj
            query_proj.weight, query_proj.bias = dense.weight, dense.bias
        parts.module.qkv_proj = QueryAndInput(query_proj, padding)
        # The module's code and vLLM's split and shape what they take for keys and values by these.
        for owner, name, number in (
            (parts.module, "kv_size", heads * shape.head_size),
            (parts.module, "num_kv_heads", heads),
            (parts.attention, "num_kv_heads", heads),
        ):
            if hasattr(owner, name):
                setattr(owner, name, number)
        return QueryAndInput(dense, padding)


def key_value_rows(parts: AttentionParts, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The key and value rows of ``qkv_proj``'s weight ``[q_size + 2 * kv_size, hidden_size]``, not copied."""
    key, value = weight[parts.q_size :].split(parts.kv_size)
    return key, value
