"""The projections of an attention module under surgery: what is read off them, and what takes their place."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from xquant_vllm.plugin.load.call import exchange
from xquant_vllm.plugin.load.modules import DenseLinear
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.plugin.load.trace.source import Source
from xquant_vllm.scheme.builder import LayerParameters
from xquant_vllm.scheme.formats import LayerShape

# The linear layers that make a layer's keys and values, by path, as dense ones.
Projections = Mapping[str, DenseLinear]


def is_plain(linear: Any) -> bool:
    """Whether a linear layer has a weight that can be read as it is, as long as vLLM has not processed it."""
    return isinstance(getattr(linear, "quant_method", None), UnquantizedLinearMethod)


def dense_stand_ins(linears: Mapping[str, Any]) -> dict[str, DenseLinear]:
    """Dense layers that share the memory of plain ones, which cannot run before vLLM has processed them."""
    return {path: dense_stand_in(linear) for path, linear in linears.items()}


def dense_stand_in(linear: Any) -> DenseLinear:
    """The same of one linear layer."""
    return DenseLinear(linear.weight.data, None if linear.bias is None else linear.bias.data, like=linear)


def behind_queries(parts: AttentionParts) -> bool:
    """Whether one linear layer makes queries, keys and values one after the other."""
    key, value = parts.key, parts.value
    wanted = Source.of_range(key.child, None, parts.q_size, 2 * parts.kv_size)
    return key.child == value.child and torch.equal(torch.cat((key.rows, value.rows)), wanted.rows)


def key_value_rows(parts: AttentionParts, projections: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows ``[kv_size, in]`` that make keys and values; not copied where they follow each other."""
    key, value = (source.take(projections[source.child].weight.data) for source in (parts.key, parts.value))
    return key, value


def layer_parameters(parts: AttentionParts, shape: LayerShape, projections: Projections) -> LayerParameters:
    """What a module makes its keys and values with; weights are not copied where rows follow each other.

    Args:
        parts: the module's parts.
        shape: the layer's sizes.
        projections: its dense key and value projections.
    """

    def bias_of(source: Source) -> torch.Tensor | None:
        """Bias of key or value heads ``[num_kv_heads, head_size]``, FP32, a copy; None without."""
        bias = projections[source.child].bias
        if bias is None:
            return None
        return source.take(bias.data).float().view(shape.num_kv_heads, shape.head_size) * source.factor

    key, value = key_value_rows(parts, projections)
    return LayerParameters(
        key=key,
        value=value,
        key_bias=bias_of(parts.key),
        value_bias=bias_of(parts.value),
        key_norm=parts.key_norm,
        rope=parts.rope,
    )


def shares_memory(parts: AttentionParts, projections: Projections) -> bool:
    """Whether writing to dense projections is enough, as they are the module's weights, or they shall replace them."""
    return all(
        getattr(linear, "weight", None) is not None and linear.weight.data_ptr() == projections[path].weight.data_ptr()
        for path, linear in parts.sources.items()
    )


def replace_rows(parts: AttentionParts, projections: Projections, down: torch.Tensor) -> dict[str, nn.Module]:
    """Put down-projections in the place of the key and value rows.

    Args:
        parts: the module's parts.
        projections: its dense key and value projections; overwritten.
        down: ``[2 * kv_size, in]``.

    Returns:
        What stands in for the linear layers, by path, while they cannot run yet.
    """
    for source, rows in zip((parts.key, parts.value), down.split(parts.kv_size), strict=True):
        dense = projections[source.child]
        source.put(dense.weight.data, rows)
        if dense.bias is not None:
            source.put(dense.bias.data, 0)
    if not shares_memory(parts, projections):
        for path, dense in projections.items():
            exchange(parts.module, path, dense)
    return dict(projections)
