"""Find out how a model's attention module makes its keys and values, by structure and not by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.norms.modules import NormModule
from xquant_vllm.plugin.load.norms.order import before_rope
from xquant_vllm.plugin.load.norms.read import read_norm
from xquant_vllm.plugin.load.rope.positions import position_axes
from xquant_vllm.plugin.load.rope.tables import read_rope
from xquant_vllm.plugin.load.trace.source import Source
from xquant_vllm.plugin.load.trace.stand_ins import Visit
from xquant_vllm.plugin.load.trace.tracer import trace
from xquant_vllm.projection.key_norm import KeyNorm
from xquant_vllm.projection.rope import RotaryTable


@dataclass(frozen=True)
class AttentionParts:
    """The parts of an attention module that surgery touches. Paths of children are those in the module.

    Attributes:
        name: the module's name in the model.
        module: the module, parent of the others.
        attention: vLLM's ``Attention`` in it.
        attention_child: its name in the module.
        key: the linear layer and the rows of it that make keys.
        value: the same for values; often of the same layer.
        q_size: channels of the queries on this rank.
        kv_size: channels of the keys, and of the values.
        hidden_size: channels of the module's input.
        key_norm: norm of the keys, before RoPE, or None.
        key_norm_child: path of its module; None without.
        rope: rotary table; None where keys are not rotated.
        rope_child: path of its module; None without.
        linears: all linear layers that run before attention, by path.
        norm_is_shared: whether queries go through the same norm.
        position_axes: how many positions the module gets for a token; 0: one, without an axis for them.
    """

    name: str
    module: Any
    attention: Any
    attention_child: str
    key: Source
    value: Source
    q_size: int
    kv_size: int
    hidden_size: int
    key_norm: KeyNorm | None
    key_norm_child: str | None
    rope: RotaryTable | None
    rope_child: str | None
    linears: Mapping[str, Any]
    norm_is_shared: bool = False
    position_axes: int = 0

    @property
    def sources(self) -> dict[str, Any]:
        """The linear layers that make keys and values, by path: one or two."""
        return {source.child: source.linear for source in (self.key, self.value)}


def recognize(name: str, module: nn.Module, attention: Any) -> AttentionParts:
    """Read the parts of an attention module.

    Args:
        name: the module's name in the model.
        module: the module that owns ``attention``.
        attention: vLLM's attention layer; its ``impl.vllm_config`` tells the longest sequence.

    Raises:
        UnsupportedError: the module is not built from parts known here.
    """
    who = f"{type(module).__name__} at {name}"
    head_size = attention.head_size
    if attention.head_size_v != head_size:
        raise unsupported_model(f"{who} has value heads of another size than its key heads, not supported")
    kv_size = attention.num_kv_heads * head_size
    attention_child = next(child for child, part in module.named_children() if part is attention)
    model_config = attention.impl.vllm_config.model_config
    axes = position_axes(model_config)
    _call_children(module)
    found = trace(name, module, attention_child, kv_size, axes)
    for visit in found.value_steps:
        raise unsupported_model(f"{who} passes its values through {type(visit.module).__name__} at {visit.path}")
    norm, rotary = _norm_and_rotary(who, found.key_steps)
    rope = None if rotary is None else read_rope(who, rotary.module, model_config.max_model_len)
    key_norm = None if norm is None else norm_of(who, norm, found.key, attention)
    if key_norm is not None and rope is not None and found.key_steps[0] is rotary:
        key_norm = before_rope(who, key_norm, rope)
    return AttentionParts(
        name=name,
        module=module,
        attention=attention,
        attention_child=attention_child,
        key=found.key,
        value=found.value,
        q_size=attention.num_heads * head_size,
        kv_size=kv_size,
        hidden_size=found.hidden_size,
        key_norm=key_norm,
        key_norm_child=None if norm is None else norm.path,
        rope=rope,
        rope_child=None if rotary is None else rotary.path,
        linears=found.linears,
        norm_is_shared=norm is not None and norm.path in {visit.path for visit in found.query_steps},
        position_axes=axes,
    )


def norm_of(who: str, visit: Visit, key: Source, attention: Any) -> KeyNorm:
    """What a module on the way of keys computes.

    Args:
        who: the attention module, for errors.
        visit: the call of it.
        key: what makes the keys.
        attention: vLLM's attention layer.

    Raises:
        UnsupportedError: it is no norm that is known here.
    """
    norm = NormModule(visit.module, visit.given[0].device)
    has_bias = key.linear.bias is not None
    return read_norm(who, norm, attention.num_kv_heads, attention.head_size, has_bias=has_bias)


def _call_children(module: Any) -> None:
    """Have a module call its children, where it would read their weights and do all at once (Qwen3-Next on a GPU)."""
    if hasattr(module, "use_fused_qk_norm_rope_gate"):
        module.use_fused_qk_norm_rope_gate = False


def _norm_and_rotary(who: str, steps: Sequence[Visit]) -> tuple[Visit | None, Visit | None]:
    """Which of the modules that keys go through normalizes and which rotates them: told from positions or not."""
    rotaries = [visit for visit in steps if visit.positional]
    norms = [visit for visit in steps if not visit.positional]
    if len(rotaries) > 1 or len(norms) > 1:
        way = ", ".join(f"{visit.path} ({type(visit.module).__name__})" for visit in steps)
        raise unsupported_model(f"{who} passes its keys through {way}; supported are one norm and one RoPE")
    return (norms[0] if norms else None), (rotaries[0] if rotaries else None)
