"""Tell vLLM's allocator how many bytes a token of a layer takes."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

from xquant_vllm.codec.layout import BLOCK_SIZE_MULTIPLE
from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.registration import BACKEND_NAME

_slot_bytes: ContextVar[int | None] = ContextVar("_slot_bytes", default=None)


def publish_page_size(attention: Any, bytes_per_token: int) -> None:
    """Make a layer report pages of its own size, so that every byte is counted and none is allocated in vain.

    Args:
        attention: vLLM's ``Attention``; its ``get_kv_cache_spec`` is replaced on this instance, since the size depends
            on the layer and vLLM's hook for backends is a class method that knows neither layer nor settings.
        bytes_per_token: bytes of a token's slot.
    """
    original = type(attention).get_kv_cache_spec.__get__(attention)
    # The layers of a draft are built later, and have pages of their own size in the same blocks.
    beside = set(attention.impl.vllm_config.compilation_config.static_forward_context)

    def get_kv_cache_spec(vllm_config: Any) -> Any:
        spec = _of_bytes(original(vllm_config), bytes_per_token)
        others = _page_of_others(vllm_config, beside)
        return replace(spec, block_size=fill_page(spec.block_size, spec.page_size_bytes, others))

    attention.get_kv_cache_spec = get_kv_cache_spec


def refuse_mixed_pages(vllm_config: Any) -> None:
    """Refuse a draft beside layers that vLLM would not let keep the sizes of their pages; called once it is loaded.

    Layers that need the same tokens share a block table, and their pages may have any size. If there are others, with
    windows or states, vLLM gives all layers pages of one size, and may part the draft's, which it then cannot serve.

    Args:
        vllm_config: vLLM's configuration, with all layers.

    Raises:
        UnsupportedError: it names the model and what to do.
    """
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)  # type: ignore[type-abstract]
    published = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in layers.items()}
    specs = {name: spec for name, spec in published.items() if spec is not None}
    sizes = {spec.page_size_bytes for spec in specs.values()}
    if len(sizes) > 1 and not UniformTypeKVCacheSpecs.is_uniform_type(specs):
        model = vllm_config.model_config
        raise UnsupportedError(
            f"xquant: speculative decoding with a draft is not supported for {model.architecture} ({model.model}) and "
            "this draft, because their layers have pages of several sizes and keep different tokens (windows, states, "
            "backend_per_kind): vLLM would give all of them pages of one size; leave --speculative-config out, or "
            "draft by ngram"
        )


def _of_bytes(spec: Any, bytes_per_token: int) -> Any:
    """An attention layer's spec with slots of so many bytes."""
    return replace(spec, dtype=torch.uint8, num_head_slots=1, state_content_bytes=bytes_per_token)


@contextmanager
def pages_beside_states(vllm_config: Any) -> Iterator[None]:
    """Let :func:`as_published` answer for the layers of an engine while vLLM aligns the pages of a hybrid model.

    Blocks of a hybrid model are as large as the state of one of its other layers, or larger, and the states are padded
    to a page of attention layers. vLLM asks the backend, and not the layers, what a page takes; it would take pages of
    keys and values for granted, whose blocks hold fewer tokens, and pad states to them.

    Args:
        vllm_config: vLLM's configuration, whose layers have published their bytes.
    """
    layers = vllm_config.compilation_config.static_forward_context.values()
    impls = [x.impl for x in layers if isinstance(x, Attention) and x.attn_backend.get_name() == BACKEND_NAME]
    # Pages have one size. Of layers with settings of their own the widest one's; others are padded.
    sizes = [impl.scheme.format.bytes_per_token for impl in impls if impl.scheme is not None]
    token = _slot_bytes.set(max(sizes, default=None))
    try:
        yield
    finally:
        _slot_bytes.reset(token)


def as_published(spec: Any) -> Any:
    """What pages of a spec's tokens take in the engine whose pages are being aligned; otherwise the spec as it is."""
    size = _slot_bytes.get()
    return spec if size is None else _of_bytes(spec, size)


def fill_page(block_size: int, page_bytes: int, other_page_bytes: int) -> int:
    """Tokens of a block that shares its pool with larger pages of layers that keep keys and values.

    vLLM pads all pages of a pool to the largest, which would take back every byte saved. Blocks of more tokens fill
    the page instead: the most half blocks that fit, because prefix caching hits only multiples of what both kinds of
    blocks divide.

    Args:
        block_size: tokens of a block as vLLM would have it.
        page_bytes: bytes of such a block.
        other_page_bytes: bytes of the largest page of the other layers, 0 if there are none.
    """
    halves = 2 if block_size % (2 * BLOCK_SIZE_MULTIPLE) == 0 else 1
    return block_size // halves * max(halves, halves * other_page_bytes // page_bytes)


def _page_of_others(vllm_config: Any, names: Collection[str]) -> int:
    """Bytes of the largest page among layers of these names that another backend serves (``backend_per_kind``)."""
    table = vllm_config.compilation_config.static_forward_context
    layers = [table[name] for name in names if name in table]
    others = [x for x in layers if isinstance(x, Attention) and x.attn_backend.get_name() != BACKEND_NAME]
    specs = [spec for layer in others if (spec := layer.get_kv_cache_spec(vllm_config)) is not None]
    return max((spec.page_size_bytes for spec in specs), default=0)
