"""Attention modules whose layer input goes into the cache as it is, by the way that keys and values go."""

from typing import Any

import torch
from torch import nn

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.call import exchange
from xquant_vllm.plugin.load.modules import DenseLinear, InputInRows, QueryAndInput
from xquant_vllm.plugin.load.projections.rows import Projections, behind_queries, shares_memory
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.plugin.load.trace.source import Source
from xquant_vllm.scheme.formats import LayerShape


def let_input_through(parts: AttentionParts, shape: LayerShape, projections: Projections) -> dict[str, nn.Module]:
    """Take the key and value rows away: queries are projected, and the layer input passes through the model's code.

    Where a linear layer makes queries, keys and values one after the other, the input takes the places of keys and of
    values, padded to whole heads, and the module counts these as its kv heads. In other layouts it takes the places of
    the key channels and goes on in those of the value channels, which must be enough for it.

    Args:
        parts: the module's parts.
        shape: the layer's sizes.
        projections: its dense key and value projections.

    Returns:
        What stands in for the linear layers, by path, while they cannot run yet.

    Raises:
        UnsupportedError: the input does not fit.
    """
    heads = -(-shape.hidden_size // shape.head_size)
    if _is_counted(parts, heads):
        return _behind_queries(parts, shape, projections, heads)
    if shape.hidden_size > 2 * parts.kv_size:
        raise UnsupportedError(
            f"xquant: {type(parts.module).__name__} at {parts.name} cannot cache its input of {shape.hidden_size} "
            f"channels, because its code passes {2 * parts.kv_size} to attention; leave cache out, or set it to "
            "latent"
        )
    return _in_rows(parts, shape, projections)


def _is_counted(parts: AttentionParts, heads: int) -> bool:
    """Whether rows are queries, keys and values one after the other, and the module can be told of other kv heads."""
    enough = heads * parts.attention.head_size == parts.kv_size
    return behind_queries(parts) and (enough or hasattr(parts.module, "kv_size"))


def _behind_queries(
    parts: AttentionParts, shape: LayerShape, projections: Projections, heads: int
) -> dict[str, nn.Module]:
    child = parts.key.child
    padding = heads * shape.head_size - shape.hidden_size
    own, stand_in = _keep_rows(parts, projections, child, Source.of_range(child, None, 0, parts.q_size).rows)
    exchange(parts.module, child, QueryAndInput(own, padding))
    # The module's code and vLLM's split and shape what they take for keys and values by these.
    for owner, name, number in (
        (parts.module, "kv_size", heads * shape.head_size),
        (parts.module, "num_kv_heads", heads),
        (parts.attention, "num_kv_heads", heads),
    ):
        if hasattr(owner, name):
            setattr(owner, name, number)
    return {child: QueryAndInput(stand_in, padding)}


def _in_rows(parts: AttentionParts, shape: LayerShape, projections: Projections) -> dict[str, nn.Module]:
    stand_ins: dict[str, nn.Module] = {}
    for child, dense in projections.items():
        # Of every output channel: which channel of the queries, then of the input, then of a zero it is.
        order = torch.full((dense.weight.shape[0],), -1, dtype=torch.int64, device="cpu")
        first = 0
        for source in (parts.key, parts.value):
            if source.child == child:
                channels = torch.arange(first, first + parts.kv_size, device="cpu").clamp(max=shape.hidden_size)
                order[source.rows] = channels
            first += parts.kv_size
        kept = (order < 0).nonzero().flatten()
        order = torch.where(order < 0, order, order + kept.numel())
        order[kept] = torch.arange(kept.numel(), device="cpu")
        own, stand_in = _keep_rows(parts, projections, child, kept) if kept.numel() else (None, None)
        order = order.to(dense.weight.device)
        exchange(parts.module, child, InputInRows(own, order, like=dense))
        stand_ins[child] = InputInRows(stand_in, order, like=dense)
    return stand_ins


def _keep_rows(
    parts: AttentionParts, projections: Projections, child: str, rows: torch.Tensor
) -> tuple[nn.Module, nn.Module]:
    """A linear layer with some of its rows only, and what stands in for it while it cannot run yet."""
    dense, source = projections[child], Source(child, None, rows)
    bias = None if dense.bias is None else source.take(dense.bias.data).clone()
    stand_in = DenseLinear(source.take(dense.weight.data).clone(), bias, like=dense)
    if not shares_memory(parts, projections):
        return stand_in, stand_in
    linear: Any = parts.sources[child]
    linear.weight, linear.bias = stand_in.weight, stand_in.bias
    return linear, stand_in
