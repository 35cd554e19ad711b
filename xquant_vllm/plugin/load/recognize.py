"""Find out how a model's attention module makes its keys and values, by structure and not by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.norms.modules import NormModule
from xquant_vllm.plugin.load.norms.order import before_rope
from xquant_vllm.plugin.load.norms.read import read_norm
from xquant_vllm.plugin.load.trace.source import Source
from xquant_vllm.plugin.load.trace.stand_ins import Visit
from xquant_vllm.plugin.load.trace.tracer import trace
from xquant_vllm.projection.key_norm import KeyNorm
from xquant_vllm.projection.rope import RotaryTable

# vLLM shares one rotary module between layers. So must their tables be, since the kernels keep a rearranged copy of
# every table they meet. It shares them between models, too, which may be served at different lengths.
_tables: "WeakKeyDictionary[nn.Module, dict[int, RotaryTable]]" = WeakKeyDictionary()


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
    found = trace(name, module, attention_child, kv_size)
    for visit in found.value_steps:
        raise unsupported_model(f"{who} passes its values through {type(visit.module).__name__} at {visit.path}")
    norm, rotary = _norm_and_rotary(who, found.key_steps)
    max_model_len = attention.impl.vllm_config.model_config.max_model_len
    rope = None if rotary is None else _read_rope(who, rotary.module, max_model_len)
    key_norm = None
    if norm is not None:
        has_bias = found.key.linear.bias is not None
        read = read_norm(
            who, NormModule(norm.module, norm.given[0].device), attention.num_kv_heads, head_size, has_bias=has_bias
        )
        behind = rope is not None and found.key_steps[0] is rotary
        key_norm = before_rope(who, read, rope) if behind and rope is not None else read
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
    )


def _norm_and_rotary(who: str, steps: Sequence[Visit]) -> tuple[Visit | None, Visit | None]:
    """Which of the modules that keys go through normalizes and which rotates them: told from positions or not."""
    rotaries = [visit for visit in steps if visit.positional]
    norms = [visit for visit in steps if not visit.positional]
    if len(rotaries) > 1 or len(norms) > 1:
        way = ", ".join(f"{visit.path} ({type(visit.module).__name__})" for visit in steps)
        raise unsupported_model(f"{who} passes its keys through {way}; supported are one norm and one RoPE")
    return (norms[0] if norms else None), (rotaries[0] if rotaries else None)


def _read_rope(who: str, rotary: Any, max_model_len: int) -> RotaryTable:
    """The table of the positions that the model can serve, ``max_model_len`` of them.

    A model's own table may be much longer (its ``max_position_embeddings``): what is never served would take memory,
    and the check after surgery probes positions spread over this table.
    """
    tables = _tables.setdefault(rotary, {})
    if max_model_len not in tables:
        cache, exact = _longrope_caches(rotary) if _is_longrope(rotary) else _caches(who, rotary)
        if cache.shape[0] < max_model_len:
            raise UnsupportedError(
                f"xquant: {who} knows {cache.shape[0]} positions ({type(rotary).__name__}), but sequences may have "
                f"--max-model-len {max_model_len} tokens, and vLLM would read behind its table for the others; set "
                f"--max-model-len {cache.shape[0]} or less"
            )
        # The module keeps its table in the model's dtype. Keys are rematerialized in FP32, so take the table before
        # that rounding, if it is the same table.
        exact = exact.float().to(cache.device)
        if exact.shape != cache.shape or (exact - cache.float()).abs().max() > 0.02 * exact.abs().max():
            exact = cache.float()
        cos, sin = exact[:max_model_len].chunk(2, -1)
        interleaved = not getattr(rotary, "is_neox_style", True)
        tables[max_model_len] = RotaryTable(cos.contiguous(), sin.contiguous(), interleaved)
    return tables[max_model_len]


def _caches(who: str, rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[positions, rotary_size]``, as a module keeps them and as it computes them."""
    cache = getattr(rotary, "cos_sin_cache", None)
    one_angle_per_position = (
        isinstance(rotary, RotaryEmbedding)
        # Subclasses that only change the frequencies (scaling) share this; others rotate in ways of their own.
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and isinstance(cache, torch.Tensor)
        and cache.shape[-1] == rotary.rotary_dim
    )
    if not one_angle_per_position:
        raise unsupported_model(f"{who} uses {type(rotary).__name__}, a kind of RoPE that is not supported")
    assert isinstance(cache, torch.Tensor)
    return cache, rotary._compute_cos_sin_cache()


def _is_longrope(rotary: Any) -> bool:
    return type(rotary) is Phi3LongRoPEScaledRotaryEmbedding


def _longrope_caches(rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of LongRoPE (Phi-3), which keeps two tables behind one another, for short and for long contexts.

    vLLM decides once, by ``max_model_len``, which one serves all sequences, so that a key is not turned by another
    angle once its sequence has grown.
    """
    short = rotary.original_max_position_embeddings
    if rotary.use_long_rope:
        exact = rotary._compute_cos_sin_cache(rotary.max_position_embeddings, rotary.long_factor, rotary.long_mscale)
        return rotary.long_short_cos_sin_cache[short:], exact
    exact = rotary._compute_cos_sin_cache(short, rotary.short_factor, rotary.short_mscale)
    return rotary.long_short_cos_sin_cache[:short], exact
