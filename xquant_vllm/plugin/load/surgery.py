"""Replace the key and value projections of an attention module, and move what they did behind the cache.

After surgery a layer's projections yield queries and latents (or the layer input itself), RoPE turns queries alone,
the key norm is gone, and :class:`LayerScheme` holds what they did. The result is checked on every layer against what
the untouched module computes: a model that treats its keys in a way not foreseen here is refused instead of served
wrongly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.call import exchange
from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.modules import QueryOnlyRotary
from xquant_vllm.plugin.load.norms.modules import KeyPassesThrough, NormModule
from xquant_vllm.plugin.load.probe import Probe, make_probe
from xquant_vllm.plugin.load.projections.as_values import pass_as_values, refuse_other_layouts
from xquant_vllm.plugin.load.projections.input_through import let_input_through
from xquant_vllm.plugin.load.projections.rows import (
    Projections,
    dense_stand_ins,
    layer_parameters,
    replace_rows,
    shares_memory,
)
from xquant_vllm.plugin.load.proof import prove_keys_and_values
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.plugin.load.transformers_backend.hosted import HostedAttention
from xquant_vllm.plugin.load.value_fold import ValueFold
from xquant_vllm.scheme.builder import Factors, SchemeBuilder
from xquant_vllm.scheme.formats import LayerFormat
from xquant_vllm.scheme.layer_scheme import LayerScheme
from xquant_vllm.scheme.settings import XQuantSettings
from xquant_vllm.scheme.unfitted import unfitted


class Surgeon:
    """Operates on the layers of a model, in the order in which they run: later ones may build on earlier ones."""

    def __init__(self, settings: XQuantSettings, formats: Sequence[LayerFormat], factors: Factors) -> None:
        """Prepare for layers of these formats, whose bases ``factors`` gives."""
        self._formats, self._builder = formats, SchemeBuilder(settings, formats, factors)
        self._fold_values = settings.fold_values
        # For the quality probe, which runs on CPUs.
        self._keeps_folded = settings.quality_probe > 0

    def operate(self, position: int, parts: AttentionParts, projections: Projections) -> LayerScheme:
        """Replace the projections of one attention module.

        Args:
            position: of the layer, in the sequence of formats.
            parts: the module's parts, untouched yet.
            projections: the linear layers that make keys and values, dense, by path; they share memory with the
                module's or replace them, and are overwritten.

        Returns:
            How the layer's cache is written and read.

        Raises:
            UnsupportedError: the module's keys or values are not what they should be.
        """
        probe = make_probe(parts, parts.hidden_size, projections[parts.key.child].weight.data)
        in_place = shares_memory(parts, projections)
        # Plain layers cannot run before vLLM has dispatched their GEMMs; a quantized one is itself the truth.
        stand_ins: dict[str, nn.Module] = dict(dense_stand_ins(parts.linears)) if in_place else {}
        before = _capture(parts, probe, stand_ins)
        form = self._formats[position]
        if form.holds != "latents":
            _refuse_factors(parts)
        if parts.norm_is_shared:
            refuse_other_layouts(parts)
        parameters = layer_parameters(parts, form.shape, projections)
        scheme, down = self._builder.build(position, parameters)
        # Now, because the weights are about to be overwritten.
        proved = unfitted(scheme, down, parameters)
        # What vLLM has processed it may have packed. What was not is still the checkpoint's.
        fold = ValueFold.prepare(parts, scheme.projection, probe, stand_ins) if in_place and self._fold_values else None
        if down is None:
            stand_ins |= let_input_through(parts, form.shape, projections)
        else:
            stand_ins |= replace_rows(parts, projections, down)
        if parts.norm_is_shared:
            scheme, proved = replace(scheme, in_values=True), replace(proved, in_values=True)
            stand_ins |= {} if down is None else pass_as_values(parts, stand_ins[parts.key.child])
        _leave_keys_alone(parts, probe.hidden.device)
        after = _capture(parts, probe, stand_ins)
        earlier = [self._formats[index].streams[0] for index in form.reads]
        prove_keys_and_values(parts, proved, earlier, probe.positions, before, after)
        if fold is None:
            return scheme
        projection = fold.perform(probe, stand_ins)
        value = scheme.projection.up_value
        kept = self._keeps_folded and projection.up_value is None and value is not None and value.device.type == "cpu"
        return replace(scheme, projection=projection, folded_value=value if kept else None)


def _refuse_factors(parts: AttentionParts) -> None:
    """Refuse factors on keys or values where one number is cached for both. A factor on latents alone does no harm."""
    for what, source in (("keys", parts.key), ("values", parts.value)):
        if source.factor != 1.0:
            raise UnsupportedError(
                f"xquant: {type(parts.module).__name__} at {parts.name} multiplies its {what} by {source.factor:g}; "
                "set the cache to latent and the method to xquant"
            )


def _capture(parts: AttentionParts, probe: Probe, stand_ins: Mapping[str, nn.Module]) -> tuple[torch.Tensor, ...]:
    return capture_qkv(parts.name, parts.module, parts.attention_child, probe.hidden, probe.given, stand_ins)


def _leave_keys_alone(parts: AttentionParts, device: torch.device) -> None:
    """Let a module hand to attention, as it is, what it takes for keys; a norm that queries need stays."""
    if isinstance(parts.module, HostedAttention):
        parts.module.leave_keys_alone()
        return
    _wrap_child(parts.module, parts.rope_child, QueryOnlyRotary)
    if not parts.norm_is_shared:
        head_size = parts.attention.head_size
        _wrap_child(
            parts.module, parts.key_norm_child, lambda norm: KeyPassesThrough(NormModule(norm, device), head_size)
        )


def _wrap_child(module: nn.Module, path: str | None, wrap: Callable[[nn.Module], nn.Module]) -> None:
    if path is not None:
        exchange(module, path, wrap(module.get_submodule(path)))
