"""The rotary table of an attention module: cosines and sines of every position that is served."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding, Phi3LongRoPEScaledRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.projection.rope import RotaryTable

# vLLM shares one rotary module between layers. So must their tables be, since the kernels keep a rearranged copy of
# every table they meet. It shares them between models, too, which may be served at different lengths.
_tables: "WeakKeyDictionary[nn.Module, dict[int, RotaryTable]]" = WeakKeyDictionary()


def read_rope(who: str, rotary: Any, max_model_len: int) -> RotaryTable:
    """The table of the positions that the model can serve, ``max_model_len`` of them.

    A model's own table may be much longer (its ``max_position_embeddings``): what is never served would take memory,
    and the check after surgery probes positions spread over this table.

    Args:
        who: the attention module, for errors.
        rotary: its rotary module.
        max_model_len: tokens of the longest sequence.

    Raises:
        UnsupportedError: a kind of RoPE that is not known, or one that knows fewer positions.
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
        # Subclasses that only change the frequencies (scaling) share this; others rotate in ways of their own.
        (isinstance(rotary, RotaryEmbedding) and type(rotary).forward_native is RotaryEmbedding.forward_native)
        # Takes every pair's angle from one of several positions. Only tokens of text are served, whose positions are
        # equal; that it makes plain RoPE of these is proved on every layer, as for all.
        or isinstance(rotary, MRotaryEmbedding)
    )
    if not (one_angle_per_position and isinstance(cache, torch.Tensor) and cache.shape[-1] == rotary.rotary_dim):
        raise unsupported_model(f"{who} uses {type(rotary).__name__}, a kind of RoPE that is not supported")
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
