"""Replace the key and value projections of an attention module, and move what they did behind the cache.

After surgery ``qkv_proj`` yields queries and latents (or the layer input itself), RoPE turns queries alone, the key
norm is gone, and :class:`LayerScheme` holds what they did. The result is checked on every layer against what the
untouched module computes: a model that treats its keys in a way not foreseen here is refused instead of served wrongly.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from xquant_vllm.attention.latents import combine
from xquant_vllm.codec.layout import Stream
from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.modules import DenseLinear, QueryOnlyRotary
from xquant_vllm.plugin.load.operations import Operation
from xquant_vllm.plugin.load.probe import make_probe
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.plugin.load.value_fold import ValueFold
from xquant_vllm.projection.rematerialize import rematerialize_keys, rematerialize_values
from xquant_vllm.scheme.builder import Factors, SchemeBuilder
from xquant_vllm.scheme.formats import LayerFormat
from xquant_vllm.scheme.layer_scheme import LayerScheme
from xquant_vllm.scheme.settings import XQuantSettings

# Relative error of rematerialized against original keys and values, by the dtype they are computed in. An unforeseen
# treatment of keys is wrong by a large part of their size; quantized activations of a quantized layer are not.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Surgeon:
    """Operates on the layers of a model, in the order in which they run: later ones may build on earlier ones."""

    def __init__(self, settings: XQuantSettings, formats: Sequence[LayerFormat], factors: Factors) -> None:
        """Prepare for layers of these formats, whose bases ``factors`` gives."""
        self._formats, self._builder = formats, SchemeBuilder(settings, formats, factors)
        self._fold_values = settings.fold_values

    def operate(self, position: int, parts: AttentionParts, dense: DenseLinear) -> LayerScheme:
        """Replace the projections of one attention module.

        Args:
            position: of the layer, in the sequence of formats.
            parts: the module's parts, untouched yet.
            dense: weight ``[q_size + 2 * kv_size, hidden_size]`` and bias of ``qkv_proj``; it shares memory with
                ``qkv_proj`` or replaces it, and is overwritten.

        Returns:
            How the layer's cache is written and read.

        Raises:
            UnsupportedError: the module's keys or values are not what they should be.
        """
        weight = dense.weight.data
        if weight.shape[0] != parts.q_size + 2 * parts.kv_size:
            raise unsupported_model(
                f"{parts.name}.qkv_proj has {weight.shape[0]} output rows, expected {parts.q_size} for queries and "
                f"2 x {parts.kv_size} for keys and values"
            )
        probe = make_probe(parts, weight.shape[1], weight)
        hidden, positions = probe.hidden, probe.positions
        in_place = getattr(parts.qkv_proj, "weight", None) is not None and (
            parts.qkv_proj.weight.data_ptr() == weight.data_ptr()
        )
        # A plain layer cannot run before vLLM has dispatched its GEMM; a quantized one is itself the truth.
        before = capture_qkv(parts.name, parts.module, hidden, positions, dense if in_place else None)
        form = self._formats[position]
        operation = Operation(parts, form, dense, in_place)
        cache, down = self._builder.build(position, operation.parameters)
        # What vLLM has processed it may have packed. What was not is still the checkpoint's.
        fold = ValueFold.prepare(parts, cache.projection, probe, dense) if in_place and self._fold_values else None
        stand_in = operation.perform(down)
        _wrap_child(parts.module, "rotary_emb", QueryOnlyRotary)
        _wrap_child(parts.module, "k_norm", lambda _: nn.Identity())
        after = capture_qkv(parts.name, parts.module, hidden, positions, stand_in)
        earlier = [self._formats[index].streams[0] for index in form.reads]
        _verify(parts, cache, earlier, positions, before, after)
        return cache if fold is None else replace(cache, projection=fold.perform(probe, stand_in))


def _wrap_child(module: nn.Module, child: str, wrap: Any) -> None:
    original = getattr(module, child, None)
    if original is not None:
        setattr(module, child, wrap(original))


def _exact_latents(
    cache: LayerScheme, earlier: Sequence[Stream], key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value latents ``[num_tokens, heads, width]`` if nothing were quantized.

    What earlier layers of a chain have stored may be anything: the own stream makes good what they do not say.
    """
    inputs = [x.flatten(1).float() for x in cache.inputs(key, value)]
    if cache.rotation is not None:
        inputs[0] = cache.rotation.apply(inputs[0])
    own = [
        x.unflatten(1, (stream.num_heads, stream.width)) for x, stream in zip(inputs, cache.format.streams, strict=True)
    ]
    if cache.format.holds == "latent":
        return own[0], own[1]
    generator = torch.Generator(device="cpu").manual_seed(1)
    stored = [
        torch.randn(own[0].shape[0], stream.num_heads, stream.width, generator=generator, device="cpu").to(own[0])
        for stream in earlier
    ]
    prediction = cache.prediction
    if prediction is not None:
        predicted = combine(prediction.terms, stored)
        own[0] = own[0] - (predicted if prediction.matrix is None else predicted @ prediction.matrix)
    latent = combine(cache.key_terms, [*stored, own[0]])
    return latent, latent


def _verify(
    parts: AttentionParts,
    cache: LayerScheme,
    earlier: Sequence[Stream],
    positions: torch.Tensor,
    before: tuple[torch.Tensor, ...],
    after: tuple[torch.Tensor, ...],
) -> None:
    shape = cache.format.shape
    key_latents, value_latents = _exact_latents(cache, earlier, after[1], after[2])
    rebuilt = (
        after[0].float(),
        rematerialize_keys(key_latents, positions, cache.projection).flatten(1),
        rematerialize_values(value_latents, cache.projection).flatten(1),
    )
    tolerance = TOLERANCE[before[0].dtype]
    for what, expected, actual in zip(("queries", "keys", "values"), before, rebuilt, strict=True):
        error = ((actual - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()
        if not error <= tolerance:
            raise unsupported_model(
                f"{type(parts.module).__name__} at {parts.name} is not recognized: its rematerialized {what} "
                f"({shape.num_kv_heads} kv heads of {shape.head_size}) differ from its own by {error:.1e} (relative, "
                f"tolerance {tolerance:.0e}), so it treats them in a way that is not supported"
            )
