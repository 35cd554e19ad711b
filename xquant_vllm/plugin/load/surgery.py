"""Replace the key and value projections of an attention module, and move what they did behind the cache.

After surgery ``qkv_proj`` yields queries and latents (or the layer input itself), RoPE turns queries alone, the key
norm is gone, and :class:`LayerScheme` holds what they did. The result is checked on every layer against what the
untouched module computes: a model that treats its keys in a way not foreseen here is refused instead of served wrongly.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.modules import DenseLinear, QueryOnlyRotary
from xquant_vllm.plugin.load.probe import make_probe
from xquant_vllm.plugin.load.projections import layer_parameters, let_input_through, replace_rows, shares_memory
from xquant_vllm.plugin.load.proof import prove_keys_and_values
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.plugin.load.value_fold import ValueFold
from xquant_vllm.scheme.builder import Factors, SchemeBuilder
from xquant_vllm.scheme.formats import LayerFormat
from xquant_vllm.scheme.layer_scheme import LayerScheme
from xquant_vllm.scheme.settings import XQuantSettings


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
        in_place = shares_memory(parts, dense)
        # A plain layer cannot run before vLLM has dispatched its GEMM; a quantized one is itself the truth.
        before = capture_qkv(parts.name, parts.module, hidden, positions, dense if in_place else None)
        form = self._formats[position]
        scheme, down = self._builder.build(position, layer_parameters(parts, form.shape, dense))
        # What vLLM has processed it may have packed. What was not is still the checkpoint's.
        fold = ValueFold.prepare(parts, scheme.projection, probe, dense) if in_place and self._fold_values else None
        if down is None:
            stand_in = let_input_through(parts, form.shape, dense)
        else:
            stand_in = replace_rows(parts, dense, down)
        _wrap_child(parts.module, "rotary_emb", QueryOnlyRotary)
        _wrap_child(parts.module, "k_norm", lambda _: nn.Identity())
        after = capture_qkv(parts.name, parts.module, hidden, positions, stand_in)
        earlier = [self._formats[index].streams[0] for index in form.reads]
        prove_keys_and_values(parts, scheme, earlier, positions, before, after)
        return scheme if fold is None else replace(scheme, projection=fold.perform(probe, stand_in))


def _wrap_child(module: nn.Module, child: str, wrap: Any) -> None:
    original = getattr(module, child, None)
    if original is not None:
        setattr(module, child, wrap(original))
