"""Keys and values into KIVI's pages and back, in PyTorch: what every store and load kernel is compared with.

Slots are ``block * block_size + offset``; pages are ``[num_blocks, page_bytes]`` uint8, whose rows may be strided.
"""

import torch

from xquant_vllm.codec.packing import pack, unpack
from xquant_vllm.codec.pages import load_uniform, section, store_uniform
from xquant_vllm.codec.quantizer import dequantize, quantize
from xquant_vllm.kivi.pages import QuantizedLayout, ResidualLayout


def store_key_groups(
    pages: torch.Tensor, layout: QuantizedLayout, blocks: torch.Tensor, groups: torch.Tensor, keys: torch.Tensor
) -> None:
    """Quantize whole groups of keys per channel.

    Args:
        pages: quantized pages.
        layout: their layout.
        blocks: ``[n]`` integer, the group's block.
        groups: ``[n]`` integer, which group of the block.
        keys: ``[n, key_group_size, num_kv_heads, head_size]``.
    """
    code_view, scale_view, zero_view = _key_sections(pages, layout)
    codes, scales, zeros, _ = quantize(keys.permute(0, 2, 3, 1), layout.bits, layout.key_group_size)
    # [n, H, D, 1, tokens] to rows of tokens.
    code_view[blocks, :, groups] = pack(codes.squeeze(3).transpose(2, 3), layout.bits)
    scale_view[blocks, :, groups] = scales.squeeze(3)
    zero_view[blocks, :, groups] = zeros.squeeze(3)


def load_key_groups(
    pages: torch.Tensor, layout: QuantizedLayout, blocks: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """Dequantize groups of keys, see :func:`store_key_groups`, to ``[n, key_group_size, num_kv_heads, head_size]``."""
    code_view, scale_view, zero_view = _key_sections(pages, layout)
    codes = unpack(code_view[blocks, :, groups], layout.bits, layout.head_size).transpose(2, 3).unsqueeze(3)
    scales, zeros = scale_view[blocks, :, groups].unsqueeze(3), zero_view[blocks, :, groups].unsqueeze(3)
    return dequantize(codes, scales, zeros, scales.new_empty(0)).permute(0, 3, 1, 2)


def store_values(pages: torch.Tensor, layout: QuantizedLayout, slots: torch.Tensor, values: torch.Tensor) -> None:
    """Quantize values ``[n, num_kv_heads, head_size]`` per token into slots ``[n]`` of quantized pages."""
    store_uniform(pages, layout.value_stream, layout.values_at, layout.block_size, slots, values)


def load_values(pages: torch.Tensor, layout: QuantizedLayout, slots: torch.Tensor) -> torch.Tensor:
    """Dequantize the values of slots ``[n]`` to ``[n, num_kv_heads, head_size]``, FP32."""
    return load_uniform(pages, layout.value_stream, layout.values_at, layout.block_size, slots)


def store_residual(
    pages: torch.Tensor, layout: ResidualLayout, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write keys and values ``[n, num_kv_heads, head_size]`` into slots ``[n]`` of residual pages, as they are."""
    block, offset = slots // layout.block_size, slots % layout.block_size
    for view, x in zip(_residual_sections(pages, layout), (keys, values), strict=True):
        view[block, :, offset] = x.to(layout.dtype)


def load_residual(
    pages: torch.Tensor, layout: ResidualLayout, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of slots ``[n]``, ``[n, num_kv_heads, head_size]`` of the layout's dtype."""
    block, offset = slots // layout.block_size, slots % layout.block_size
    keys, values = _residual_sections(pages, layout)
    return keys[block, :, offset], values[block, :, offset]


def _key_sections(pages: torch.Tensor, layout: QuantizedLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``[B, H, groups, tokens, bytes]``, scales and zeros ``[B, H, groups, D]`` as views of pages."""
    heads, groups = layout.num_kv_heads, layout.num_key_groups
    code_shape = (heads, groups, layout.key_group_size, layout.key_row_bytes)
    return (
        section(pages, layout.key_codes_at, code_shape, torch.uint8),
        section(pages, layout.key_scales_at, (heads, groups, layout.head_size), torch.float16),
        section(pages, layout.key_zeros_at, (heads, groups, layout.head_size), torch.float16),
    )


def _residual_sections(pages: torch.Tensor, layout: ResidualLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[B, H, N, D]`` as views of pages."""
    shape = (layout.num_kv_heads, layout.block_size, layout.head_size)
    return section(pages, 0, shape, layout.dtype), section(pages, layout.values_at, shape, layout.dtype)
