"""The projections of an attention module under surgery: what is read off them, and what takes their place."""

from typing import Any

import torch
from torch import nn

from xquant_vllm.plugin.load.modules import DenseLinear, QueryAndInput
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.scheme.builder import LayerParameters
from xquant_vllm.scheme.formats import LayerShape


def key_value_rows(parts: AttentionParts, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The key and value rows of ``qkv_proj``'s weight ``[q_size + 2 * kv_size, hidden_size]``, not copied."""
    key, value = weight[parts.q_size :].split(parts.kv_size)
    return key, value


def layer_parameters(parts: AttentionParts, shape: LayerShape, dense: DenseLinear) -> LayerParameters:
    """What a module makes its keys and values with; the weights are not copied.

    Args:
        parts: the module's parts.
        shape: the layer's sizes.
        dense: weight ``[q_size + 2 * kv_size, hidden_size]`` and bias of its ``qkv_proj``.
    """

    def bias_of(start: int) -> torch.Tensor | None:
        """Bias of key or value heads ``[num_kv_heads, head_size]``, FP32, a copy; None without."""
        if dense.bias is None:
            return None
        rows = dense.bias.data[start : start + parts.kv_size]
        return rows.float().view(shape.num_kv_heads, shape.head_size).clone()

    key, value = key_value_rows(parts, dense.weight.data)
    return LayerParameters(
        key=key,
        value=value,
        key_bias=bias_of(parts.q_size),
        value_bias=bias_of(parts.q_size + parts.kv_size),
        key_norm=parts.key_norm,
        rope=parts.rope,
    )


def shares_memory(parts: AttentionParts, dense: DenseLinear) -> bool:
    """Whether ``dense`` is ``qkv_proj`` itself, so that writing to it is enough, or shall replace it."""
    weight = getattr(parts.qkv_proj, "weight", None)
    return weight is not None and weight.data_ptr() == dense.weight.data_ptr()


def replace_rows(parts: AttentionParts, dense: DenseLinear, down: torch.Tensor) -> nn.Module:
    """Put down-projections in the place of the key and value rows.

    Args:
        parts: the module's parts.
        dense: weight ``[q_size + 2 * kv_size, hidden_size]`` and bias of its ``qkv_proj``; overwritten.
        down: ``[2 * kv_size, hidden_size]``.

    Returns:
        What stands in for ``qkv_proj`` when it cannot run yet.
    """
    in_place = shares_memory(parts, dense)
    dense.weight.data[parts.q_size :] = down
    if dense.bias is not None:
        dense.bias.data[parts.q_size :] = 0
    if not in_place:
        parts.module.qkv_proj = dense
    return dense


def let_input_through(parts: AttentionParts, shape: LayerShape, dense: DenseLinear) -> nn.Module:
    """Take the key and value rows away: queries are projected, and the layer input goes into the cache as it is.

    Args:
        parts: the module's parts.
        shape: the layer's sizes.
        dense: weight ``[q_size + 2 * kv_size, hidden_size]`` and bias of its ``qkv_proj``.

    Returns:
        What stands in for ``qkv_proj`` when it cannot run yet.
    """
    heads = -(-shape.hidden_size // shape.head_size)
    padding = heads * shape.head_size - shape.hidden_size
    queries = slice(0, parts.q_size)
    bias = None if dense.bias is None else dense.bias.data[queries].clone()
    query_rows = DenseLinear(dense.weight.data[queries].clone(), bias)
    query_proj: Any = query_rows
    if shares_memory(parts, dense):
        query_proj = parts.qkv_proj
        query_proj.weight, query_proj.bias = query_rows.weight, query_rows.bias
    parts.module.qkv_proj = QueryAndInput(query_proj, padding)
    # The module's code and vLLM's split and shape what they take for keys and values by these.
    for owner, name, number in (
        (parts.module, "kv_size", heads * shape.head_size),
        (parts.module, "num_kv_heads", heads),
        (parts.attention, "num_kv_heads", heads),
    ):
        if hasattr(owner, name):
            setattr(owner, name, number)
    return QueryAndInput(query_rows, padding)
