"""Replace the key and value rows of an attention module by down-projections, and move the rest behind the cache.

After surgery ``qkv_proj`` yields queries and latents, RoPE turns queries alone, the key norm is gone, and
:class:`LayerProjection` holds what they did. The result is checked on every layer against what the untouched module
computes, so that a model which treats its keys in a way not foreseen here is refused instead of served wrongly.
"""

from typing import Any

import torch
from torch import nn

from xquant_vllm.integration.capture import capture_qkv
from xquant_vllm.integration.checks import UnsupportedError
from xquant_vllm.integration.factors import FactorProvider, LayerWeights
from xquant_vllm.integration.modules import DenseLinear, QueryOnlyRotary
from xquant_vllm.integration.recognize import AttentionParts
from xquant_vllm.projection.basis import LatentBasis
from xquant_vllm.projection.rematerialize import LayerProjection, rematerialize_keys, rematerialize_values

_PROBE_TOKENS = 16
# Relative error of rematerialized against original keys and values, by the dtype they are computed in. An unforeseen
# treatment of keys is wrong by a large part of their size; quantized activations of a quantized layer are not.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def operate(parts: AttentionParts, layer_index: int, factors: FactorProvider, dense: DenseLinear) -> LayerProjection:
    """Factorize and replace the projections of one attention module.

    Args:
        parts: the module's parts, untouched yet.
        layer_index: the layer, counted from the model's first.
        factors: gives the layer's bases.
        dense: weight ``[q_size + 2 * kv_size, hidden_size]`` and bias of ``qkv_proj``. Its key and value rows are
            overwritten by the down-projections, their bias by 0; it shares memory with ``qkv_proj`` or replaces it.

    Returns:
        What rematerializes the layer's keys and values.

    Raises:
        UnsupportedError: the module's keys or values are not what the factorization says they should be.
    """
    weight = dense.weight.data
    if weight.shape[0] != parts.q_size + 2 * parts.kv_size:
        raise UnsupportedError(
            f"xquant: {parts.name}.qkv_proj has {weight.shape[0]} output rows, expected {parts.q_size} for queries and "
            f"2 x {parts.kv_size} for keys and values; choose another --attention-backend for this model"
        )
    hidden, positions = _probe(parts, weight)
    shares_memory = getattr(parts.qkv_proj, "weight", None) is not None and (
        parts.qkv_proj.weight.data_ptr() == weight.data_ptr()
    )
    # A plain layer cannot run before vLLM has dispatched its GEMM; a quantized one is itself the truth.
    before = capture_qkv(parts.name, parts.module, hidden, positions, dense if shares_memory else None)
    bases = factors.layer_factors(layer_weights(parts, layer_index, weight))
    projection = _replace_rows(parts, bases, weight, None if dense.bias is None else dense.bias.data)
    if not shares_memory:
        parts.module.qkv_proj = dense
    _wrap_child(parts.module, "rotary_emb", QueryOnlyRotary)
    _wrap_child(parts.module, "k_norm", lambda _: nn.Identity())
    after = capture_qkv(parts.name, parts.module, hidden, positions, dense)
    _verify(parts, projection, positions, before, after)
    return projection


def layer_weights(parts: AttentionParts, layer_index: int, weight: torch.Tensor) -> LayerWeights:
    """The key and value rows of ``qkv_proj``'s weight ``[q_size + 2 * kv_size, hidden_size]``, not copied."""
    key, value = weight[parts.q_size :].split(parts.kv_size)
    return LayerWeights(layer_index, key, value, parts.attention.num_kv_heads)


def _replace_rows(
    parts: AttentionParts, bases: tuple[LatentBasis, LatentBasis], weight: torch.Tensor, bias: torch.Tensor | None
) -> LayerProjection:
    """Overwrite the key and value rows of ``weight`` and ``bias``; return what inverts them."""
    kv_heads, head_size = parts.attention.num_kv_heads, parts.attention.head_size
    ups, biases = [], []
    for start, basis in zip((parts.q_size, parts.q_size + parts.kv_size), bases, strict=True):
        rows = slice(start, start + parts.kv_size)
        weight[rows] = basis.down.transpose(1, 2).reshape(parts.kv_size, -1)
        ups.append(basis.up)
        biases.append(None if bias is None else bias[rows].float().view(kv_heads, head_size).clone())
        if bias is not None:
            bias[rows] = 0
    return LayerProjection(
        up_key=ups[0],
        up_value=ups[1],
        key_bias=biases[0],
        value_bias=biases[1],
        key_norm=parts.key_norm,
        rope=parts.rope,
    )


def _wrap_child(module: nn.Module, child: str, wrap: Any) -> None:
    original = getattr(module, child, None)
    if original is not None:
        setattr(module, child, wrap(original))


def _probe(parts: AttentionParts, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Random layer inputs at positions over the whole range of the model."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    # Loading happens under the default dtype of the model: name every dtype.
    hidden = torch.randn(_PROBE_TOKENS, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    last = 1024 if parts.rope is None else parts.rope.cos.shape[0] - 1
    positions = torch.linspace(0, last, _PROBE_TOKENS, dtype=torch.float64, device="cpu").long()
    return hidden.to(weight), positions.to(weight.device)


def _verify(
    parts: AttentionParts,
    projection: LayerProjection,
    positions: torch.Tensor,
    before: tuple[torch.Tensor, ...],
    after: tuple[torch.Tensor, ...],
) -> None:
    kv_heads, head_size = parts.attention.num_kv_heads, parts.attention.head_size
    latents = [
        x.float().view(_PROBE_TOKENS, -1, up.shape[1])
        for x, up in zip(after[1:], (projection.up_key, projection.up_value), strict=True)
    ]
    rebuilt = (
        after[0].float(),
        rematerialize_keys(latents[0], positions, projection).flatten(1),
        rematerialize_values(latents[1], projection).flatten(1),
    )
    tolerance = _TOLERANCE[before[0].dtype]
    for what, expected, actual in zip(("queries", "keys", "values"), before, rebuilt, strict=True):
        error = ((actual - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()
        if not error <= tolerance:
            raise UnsupportedError(
                f"xquant: {type(parts.module).__name__} at {parts.name} is not recognized: its rematerialized {what} "
                f"({kv_heads} kv heads of {head_size}) differ from its own by {error:.1e} (relative, tolerance "
                f"{tolerance:.0e}), so it treats them in a way that is not supported; choose another "
                "--attention-backend for this model"
            )
