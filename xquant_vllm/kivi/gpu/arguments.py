"""How pages are described to the kernels."""

from typing import Any, NamedTuple

import torch

from xquant_vllm.kivi.pages import QuantizedLayout, ResidualLayout


class QuantizedPages(NamedTuple):
    """Quantized pages, uint8; offsets of sections and the stride between pages are bytes. Key codes start at 0."""

    pages: Any
    stride: Any
    block_size: Any
    key_scales: Any
    key_zeros: Any
    value_codes: Any
    value_scales: Any
    value_zeros: Any


class ResidualPages(NamedTuple):
    """Residual pages, uint8, in bytes too, and their block table. Keys start at 0."""

    pages: Any
    stride: Any
    block_size: Any
    values_at: Any
    block_table: Any


def describe_quantized(pages: torch.Tensor, layout: QuantizedLayout) -> QuantizedPages:
    """Quantized pages ``[num_blocks, page_bytes]`` uint8 as kernels read and write them."""
    values = layout.values_at
    return QuantizedPages(
        pages,
        pages.stride(0),
        layout.block_size,
        layout.key_scales_at,
        layout.key_zeros_at,
        values.codes,
        values.scales,
        values.zeros,
    )


def describe_residual(pages: torch.Tensor, layout: ResidualLayout, block_table: torch.Tensor) -> ResidualPages:
    """Residual pages ``[num_blocks, page_bytes]`` uint8 as kernels read and write them."""
    return ResidualPages(pages, pages.stride(0), layout.block_size, layout.values_at, block_table)
