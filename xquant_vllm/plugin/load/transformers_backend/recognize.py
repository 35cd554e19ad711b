"""Read the parts of attention modules that run through vLLM's Transformers backend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.norms.order import before_rope
from xquant_vllm.plugin.load.proof import TOLERANCE
from xquant_vllm.plugin.load.random_input import random_input
from xquant_vllm.plugin.load.recognize import AttentionParts, norm_of
from xquant_vllm.plugin.load.trace.stand_ins import Visit, output_rows
from xquant_vllm.plugin.load.trace.tracer import Trace, trace
from xquant_vllm.plugin.load.transformers_backend.calls import OwnerCall, record_calls
from xquant_vllm.plugin.load.transformers_backend.hosted import ATTENTION, Carrying, HostedAttention, stand_before
from xquant_vllm.plugin.load.transformers_backend.keys import KeyPath, find_key_path
from xquant_vllm.plugin.load.transformers_backend.layouts import layout_of
from xquant_vllm.plugin.load.transformers_backend.tables import DynamicAnglesError, RotaryTables
from xquant_vllm.projection.key_norm import KeyNorm
from xquant_vllm.projection.rope import RotaryTable

_TOKENS = 16


@dataclass(frozen=True)
class _Run:
    """What all modules of a model are run on.

    Attributes:
        hidden: layer inputs ``[num_tokens, hidden_size]``.
        positions: ``[num_tokens]``.
        calls: how the model calls them.
        tables: the model's rotary tables.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    calls: Mapping[nn.Module, OwnerCall]
    tables: RotaryTables


class _Given(nn.Module):
    """In place of a linear layer: whatever the input, the output is known, ``[num_tokens, rows]``."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output.clone().view(*x.shape[:-1], -1)


def recognize_hosted(base: Any, layers: Sequence[tuple[str, nn.Module, Any]]) -> dict[str, AttentionParts]:
    """Read the parts of the attention modules of one model.

    Args:
        base: the model, of vLLM's Transformers backend.
        layers: its attention layers as (name of the owner, owner, attention).

    Returns:
        The parts by the name of the owner.

    Raises:
        UnsupportedError: a module is not built from parts known here.
    """
    config = layers[0][2].impl.vllm_config.model_config
    device = next(layers[0][1].parameters()).device
    hidden = random_input(_TOKENS, base.text_config.hidden_size, config.dtype, device)
    last = config.max_model_len - 1
    positions = torch.linspace(0, last, _TOKENS, dtype=torch.float64, device="cpu").long().to(device)
    decoder = base.model.get_decoder()
    try:
        calls = record_calls(decoder, [owner for _, owner, _ in layers], hidden, positions)
    except Exception as error:  # whatever a model's code may raise
        raise unsupported_model(
            f"{type(decoder).__name__} is not recognized: it fails on tokens that are in no batch "
            f"({type(error).__name__}: {error})"
        ) from error
    run = _Run(hidden, positions, calls, RotaryTables(config.max_model_len))
    return {name: _recognize(name, owner, attention, run) for name, owner, attention in layers}


def _recognize(name: str, owner: nn.Module, attention: Any, run: _Run) -> AttentionParts:
    who = f"{type(owner).__name__} at {name}"
    if owner not in run.calls:
        raise unsupported_model(f"{who} is not recognized: its model never called it")
    head_size = attention.head_size
    if attention.head_size_v != head_size:
        raise unsupported_model(f"{who} has value heads of another size than its key heads, not supported")
    q_size, kv_size = attention.num_heads * head_size, attention.num_kv_heads * head_size
    module = stand_before(owner, attention, run.calls[owner])
    with module.turning_nothing():
        found = trace(name, module, ATTENTION, kv_size)
    visit = _norm(who, found)
    norm = None if visit is None else norm_of(who, visit, found.key, attention)
    path = _key_path(who, name, module, attention, run, found, norm)
    if norm is not None and path.rope is not None and path.behind:
        norm = before_rope(who, norm, path.rope)
    needed = norm is not None or path.rope is not None
    layout = layout_of(found.key, found.value, q_size, kv_size, head_size)
    if needed and (found.key.factor, found.value.factor) != (1.0, 1.0):
        raise unsupported_model(f"{who} is not recognized: it turns or normalizes keys, and multiplies keys or values")
    if layout is not None:
        module.carry(Carrying(layout, found.key.child, found.value.child, needed))
    elif needed:
        raise unsupported_model(
            f"{who} is not recognized: it turns or normalizes keys, and its {found.key.child} has queries, keys and "
            "values in an order in which nothing can be carried past that"
        )
    return AttentionParts(
        name=name,
        module=module,
        attention=attention,
        attention_child=ATTENTION,
        key=found.key,
        value=found.value,
        q_size=q_size,
        kv_size=kv_size,
        hidden_size=found.hidden_size,
        key_norm=norm,
        key_norm_child=None if visit is None else visit.path,
        rope=path.rope,
        rope_child=None,
        linears=found.linears,
    )


def _norm(who: str, found: Trace) -> Visit | None:
    """The only other module that keys go through; values go through none."""
    steps = [*found.value_steps, *found.key_steps]
    if found.value_steps or len(steps) > 1 or any(visit.positional for visit in steps):
        way = ", ".join(f"{visit.path} ({type(visit.module).__name__})" for visit in steps)
        raise unsupported_model(f"{who} passes its keys or values through {way}; supported is one norm of keys")
    return steps[0] if steps else None


def _key_path(
    who: str,
    name: str,
    module: HostedAttention,
    attention: Any,
    run: _Run,
    found: Trace,
    norm: KeyNorm | None,
) -> KeyPath:
    """What a module does to its keys.

    Raises:
        UnsupportedError: nothing that is known here.
    """
    head_size, tokens = attention.head_size, run.hidden.shape[0]
    given = {
        path: random_input(tokens, output_rows(linear), run.hidden.dtype, run.hidden.device, seed=3 + index)
        for index, (path, linear) in enumerate(found.linears.items())
    }
    stand_ins = {path: _Given(output) for path, output in given.items()}
    _, keys, _ = capture_qkv(name, module, ATTENTION, run.hidden, run.positions, stand_ins)
    projected = found.key.take(given[found.key.child].T).T * found.key.factor
    path = find_key_path(
        projected.float().unflatten(1, (-1, head_size)),
        keys.float().unflatten(1, (-1, head_size)),
        run.positions,
        norm,
        _tables(who, run, run.calls[module.owner], head_size),
    )
    tolerance = TOLERANCE[run.hidden.dtype]
    if not path.error <= tolerance:
        raise unsupported_model(
            f"{who} is not recognized: no kind of RoPE known here makes the keys that it hands to attention (best "
            f"relative error {path.error:.1e}, tolerance {tolerance:.0e})"
        )
    return path


def _tables(who: str, run: _Run, call: OwnerCall, head_size: int) -> list[RotaryTable]:
    """The rotations that the position embeddings of a module may stand for."""
    try:
        return [table for rotary in call.rotary for table in run.tables.of(rotary, head_size)]
    except DynamicAnglesError as error:
        raise unsupported_model(
            f"{who} turns positions by angles that change when a longer sequence is in the batch, so that a cached key "
            "would be turned otherwise than a new one; set --max-model-len to the length that the model was trained "
            "for (original_max_position_embeddings)"
        ) from error
