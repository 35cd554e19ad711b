"""Fold the up-projection of values into the output projection of an attention module.

Attention ends with one up-projection per query head, of the weighed latents, and the output projection, a linear layer,
multiplies what comes out of it. Where a layer has a square up-projection for every kv head, and nothing is added in
between, both are one matrix: ``W_o[:, h] U_h^T`` for query head h. Attention then returns the weighed latents.

As with keys and values nothing is trusted to be recognized: the untouched module and the folded one are run on the same
attention output, the latter in latents, and a layer whose outputs differ is left as it is. The product is in FP64 and
rounded once, to the dtype of the output projection.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear

from xquant_vllm.plugin.load.call import is_whole_layer
from xquant_vllm.plugin.load.capture import module_output
from xquant_vllm.plugin.load.modules import DenseLinear
from xquant_vllm.plugin.load.probe import Probe
from xquant_vllm.plugin.load.projections.rows import dense_stand_in, is_plain
from xquant_vllm.plugin.load.random_input import random_input
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.plugin.load.trace.stand_ins import Coded, descendants, is_linear, output_rows
from xquant_vllm.projection.rematerialize import LayerProjection

logger = logging.getLogger("vllm.xquant_vllm")

# Relative difference of the outputs, by dtype: several roundings' worth. Below it nothing but rounding differs.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class ValueFold:
    """A fold that seems possible, made while the module is untouched.

    Attributes:
        parts: the module's parts.
        projection: of the layer, with the up-projection to fold.
        child: path of the output projection in the module.
        latents: random weighed latents ``[num_tokens, num_heads * head_size]``.
        expected: the untouched module's output for the attention output that they stand for.
    """

    parts: AttentionParts
    projection: LayerProjection
    child: str
    latents: torch.Tensor
    expected: torch.Tensor

    @classmethod
    def prepare(
        cls, parts: AttentionParts, projection: LayerProjection, probe: Probe, stand_ins: Mapping[str, nn.Module]
    ) -> "ValueFold | None":
        """Look whether a module's values can be folded.

        Args:
            parts: the module's parts, untouched.
            projection: what its latents will be multiplied by.
            probe: what to run it on.
            stand_ins: take the places of linear layers before attention, by path, which cannot run yet.

        Returns:
            The fold, or None where the layer has to do without.
        """
        up = projection.up_value
        if up is None or projection.value_width != projection.head_size or projection.value_bias is not None:
            return None
        child = output_projection(parts, probe, stand_ins)
        if child is None:
            return None
        tokens, heads = probe.hidden.shape[0], parts.attention.num_heads
        latents = random_input(tokens, heads * projection.head_size, up.dtype, up.device, seed=2)
        of_heads = up.repeat_interleave(heads // projection.num_kv_heads, 0)
        attended = torch.einsum("thw,hws->ths", latents.unflatten(1, (heads, -1)), of_heads)
        attended, latents = attended.flatten(1).to(probe.hidden), latents.to(probe.hidden)
        expected = _output(parts, probe, attended, {**stand_ins, **_behind(parts)})
        return None if expected is None else cls(parts, projection, child, latents, expected)

    def perform(self, probe: Probe, stand_ins: Mapping[str, nn.Module]) -> LayerProjection:
        """Fold, if the module's output stays what it was.

        Args:
            probe: the same as before.
            stand_ins: take the places of linear layers before attention, by path, after surgery.

        Returns:
            The projection without its value up-projection; with it where nothing was folded.
        """
        o_proj = self.parts.module.get_submodule(self.child)
        assert self.projection.up_value is not None
        folded = fold(o_proj.weight.data, self.projection.up_value)
        children = {**stand_ins, **_behind(self.parts)}
        children[self.child] = DenseLinear(folded, dense_stand_in(o_proj).bias, like=o_proj)
        actual = _output(self.parts, probe, self.latents, children)
        if actual is None or actual.shape != self.expected.shape:
            return self.projection
        expected = self.expected.float()
        error = ((actual.float() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        if not error <= _TOLERANCE[folded.dtype]:
            logger.debug("xquant: values of %s are not folded: its output changes by %.1e", self.parts.name, error)
            return self.projection
        o_proj.weight.data.copy_(folded)
        return replace(self.projection, up_value=None)


def fold(weight: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """An output projection of weighed latents.

    Args:
        weight: ``[out, num_heads * head_size]``, of attention outputs; any floating dtype.
        up: ``[num_kv_heads, head_size, head_size]``, FP32, from latents to values. Query heads share kv heads in
            consecutive groups.

    Returns:
        ``[out, num_heads * head_size]``, in the weight's dtype, rounded once.
    """
    kv_heads, _, head_size = up.shape
    of_heads = weight.to(torch.float64).unflatten(1, (kv_heads, -1, head_size))
    return torch.einsum("okgs,kws->okgw", of_heads, up.to(torch.float64)).flatten(1).to(weight.dtype)


def output_projection(parts: AttentionParts, probe: Probe, stand_ins: Mapping[str, nn.Module]) -> str | None:
    """Find the linear layer that is given what attention returns, as it is, by running the module.

    Args:
        parts: the module's parts.
        probe: what to run it on.
        stand_ins: take the places of linear layers before attention, by path, which cannot run yet.

    Returns:
        Its path; None without exactly one, or if its weight cannot be exchanged.
    """
    if is_whole_layer(parts.module):
        return None  # what follows, experts for instance, may not run before vLLM has processed its weights
    linears = _linears_behind(parts)
    tokens = probe.hidden.shape[0]
    coded = {
        path: Coded(path, linear, torch.zeros(tokens, output_rows(linear), dtype=torch.float32, device="cpu"))
        for path, linear in linears.items()
    }
    attended = random_input(tokens, parts.q_size, probe.hidden.dtype, probe.hidden.device, seed=3)
    if _output(parts, probe, attended, {**stand_ins, **coded}) is None:
        return None
    found = [path for path, stand_in in coded.items() if stand_in.given is not None and _same(stand_in.given, attended)]
    return found[0] if len(found) == 1 and _is_exchangeable(linears[found[0]], parts.q_size) else None


def _linears_behind(parts: AttentionParts) -> dict[str, Any]:
    """Linear layers that do not run before attention, by path."""
    return {
        path: child
        for path, child in descendants(parts.module, parts.attention_child)
        if is_linear(child) and path not in parts.linears
    }


def _behind(parts: AttentionParts) -> dict[str, nn.Module]:
    """What stands in for them; those that are not plain have to run themselves."""
    return {path: dense_stand_in(linear) for path, linear in _linears_behind(parts).items() if is_plain(linear)}


def _same(given: torch.Tensor, attended: torch.Tensor) -> bool:
    return given.numel() == attended.numel() and torch.equal(given.reshape(attended.shape), attended)


def _is_exchangeable(linear: Any, width: int) -> bool:
    """Whether a linear layer is plain, and its weight ``[out, width]`` on this rank can be exchanged."""
    weight = getattr(linear, "weight", None)
    return (
        type(linear) in (RowParallelLinear, ReplicatedLinear)
        and is_plain(linear)
        and (linear.tp_size == 1 or getattr(linear, "input_is_parallel", False))
        and isinstance(weight, torch.Tensor)
        and weight.dtype in _TOLERANCE
        and weight.dim() == 2
        and weight.shape[1] == width
    )


def _output(
    parts: AttentionParts, probe: Probe, attended: torch.Tensor, children: Mapping[str, nn.Module]
) -> torch.Tensor | None:
    """The module's output, or None if it cannot be had this way."""
    try:
        return module_output(parts.module, parts.attention_child, probe.hidden, probe.given, attended, children)
    except Exception as error:  # whatever a model's code may raise; the layer is served without the fold
        logger.debug("xquant: values of %s are not folded: %s: %s", parts.name, type(error).__name__, error)
        return None
