"""Writing tokens to the pool of hot blocks in one call of the C++ kernels: read, multiply, finish, write.

In PyTorch: :func:`xquant_vllm.attention.hot.rematerialize.rematerialize` and
:meth:`xquant_vllm.attention.hot.pool.Pool.put`. A token's numbers have the same bits whatever else is in the call, so
new tokens and promoted ones are the same.
"""

import ctypes
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F

from xquant_vllm.attention.cpu.abi import HotCall, HotLayer, HotPlaces
from xquant_vllm.attention.cpu.library import library, products, raise_error
from xquant_vllm.attention.cpu.plan import prepare
from xquant_vllm.attention.cpu.tensors import dtype_code, index_address
from xquant_vllm.attention.hot.pool import Pool
from xquant_vllm.attention.hot.rematerialize import started_latents
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan

# csrc/cpu/hot/product.h: columns that lie together, and what columns are padded to.
_PANEL, _LANES = 32, 16


def write(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    tokens: HotTokens,
    pool: Pool,
    layer: Hashable = None,
    before: Hashable = None,
) -> None:
    """Write a step's tokens to the pool.

    Args:
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8; they hold the tokens.
        plan: the layer's plan.
        tokens: the tokens; what they carry is taken and replaced.
        pool: the layer's pool, written.
        layer: under what name the layer's latents are carried on; None: they are not.
        before: under what name the layer before in a chain has left its latents, or None.

    Raises:
        ValueError: a tensor has the wrong type, shape or strides, or a slot or position is out of range.
    """
    prepared = prepare(plan, *products())
    structs, num_blocks = prepared.structs_of(pages)
    call = HotCall.from_buffer_copy(_call_of(tokens))
    call.pages, call.num_blocks = structs, num_blocks
    if (layer is not None or before is not None) and plan.value_terms == plan.key_terms:
        latents, call.first_term = started_latents(plan, tokens, before)
        call.latents = latents.data_ptr()
        if layer is not None:
            tokens.carried = (layer, latents)
    raise_error(library.xquant_cpu_write_hot(prepared.pointer, _prepared_layer(pool, plan).pointer, ctypes.byref(call)))


@per_object
def _call_of(tokens: HotTokens) -> HotCall:
    """The struct of a step's tokens, which go through all layers: looked at once."""
    if not tokens.slots.shape == tokens.positions.shape == tokens.hot_slots.shape:
        raise ValueError("slots, positions and hot_slots must be as many")
    return HotCall(
        slots=index_address("slots", tokens.slots, torch.int64, 1),
        positions=index_address("positions", tokens.positions, torch.int64, 1),
        hot_slots=index_address("hot_slots", tokens.hot_slots, torch.int64, 1),
        num_tokens=tokens.count,
    )


class _Layer:
    """The C struct of a pool and its layer, and the tensors that it points to."""

    def __init__(self, pool: Pool, plan: AttentionLayerPlan) -> None:
        projection, layout = plan.projection, pool.layout
        kv_heads, head_size, block_size = projection.num_kv_heads, projection.head_size, plan.layout.block_size
        shape = (kv_heads, block_size * head_size)
        for name, memory in (("keys", pool.keys), ("values", pool.values)):
            if memory.shape[1:] != shape or memory.stride(2) != 1 or memory.stride() != pool.keys.stride():
                raise ValueError(
                    f"{name} must be [num_hot_blocks, {shape[0]}, {shape[1]}] with contiguous heads, not "
                    f"{list(memory.shape)} with strides {memory.stride()}"
                )
        if pool.values.dtype != pool.keys.dtype:
            raise ValueError(f"values must be {pool.keys.dtype} as keys, not {pool.values.dtype}")
        self._kept: list[torch.Tensor] = []
        dtype = pool.keys.dtype
        self.struct = HotLayer(
            dtype=dtype_code("keys", pool.keys),
            shared=int(plan.value_terms == plan.key_terms),
            up_key=self._up(projection.up_key, dtype),
            up_value=None if projection.up_value is None else self._up(projection.up_value, dtype),
            keys=self._places(pool.keys, layout.key_tokens, layout.key_channels, block_size, head_size),
            values=self._places(pool.values, layout.value_tokens, layout.value_channels, block_size, head_size),
            block_stride=pool.keys.stride(0),
            head_stride=pool.keys.stride(1),
            num_hot_blocks=min(pool.keys.shape[0], pool.values.shape[0]),
        )
        self.pointer = ctypes.byref(self.struct)

    def _up(self, up: torch.Tensor, dtype: torch.dtype) -> int:
        self._kept.append(packed_up(up, dtype))
        return self._kept[-1].data_ptr()

    def _places(
        self, memory: torch.Tensor, tokens: torch.Tensor, channels: torch.Tensor, block_size: int, head_size: int
    ) -> HotPlaces:
        if tokens.shape != (block_size,) or channels.shape != (head_size,):
            raise ValueError(f"the pool's layout is not one of {block_size} tokens with heads of {head_size}")
        if min(tokens.min(), channels.min()) < 0 or tokens.max() + channels.max() >= memory.shape[2]:
            raise ValueError("the pool's layout names places outside of a block")
        self._kept += [tokens, channels]
        return HotPlaces(
            data=memory.data_ptr(),
            tokens=index_address("tokens", tokens, torch.int64, 1),
            channels=index_address("channels", channels, torch.int64, 1),
            contiguous=int(torch.equal(channels, torch.arange(head_size))),
        )


@per_object
def _prepared_layer(pool: Pool, plan: AttentionLayerPlan) -> _Layer:
    return _Layer(pool, plan)


def packed_up(up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An up-projection as csrc/cpu/hot/product.h reads it; see ``xquant_hot_layer``.

    Args:
        up: ``[num_kv_heads, width, head_size]`` FP32.
        dtype: of the pool.

    Returns:
        ``[num_kv_heads, width, columns]``, of BF16 with the columns in panels.
    """
    padded = F.pad(up, (0, -up.shape[2] % _LANES))
    if dtype != torch.bfloat16:
        return padded.contiguous()
    if up.shape[1] % 2:
        raise ValueError(f"an up-projection of {up.shape[1]} channels is not supported: they must be even")
    pairs = padded.to(dtype).unflatten(1, (-1, 2))
    panels = [panel.transpose(2, 3).flatten(1) for panel in pairs.split(_PANEL, 3)]
    return torch.cat(panels, 1).view(padded.shape)
