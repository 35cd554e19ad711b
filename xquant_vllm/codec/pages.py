"""Latents into pages and back, in PyTorch: the reference that every store and load kernel is compared with."""

import torch

from xquant_vllm.codec.allocated import AllocatedFormat, dequantize_allocated, quantize_allocated
from xquant_vllm.codec.allocation import run_bytes
from xquant_vllm.codec.layout import PageLayout, StreamFormat, StreamOffsets
from xquant_vllm.codec.packing import pack, packed_size, unpack
from xquant_vllm.codec.quantizer import dequantize, quantize, to_fp16


def section(pages: torch.Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """View bytes ``start...`` of every page ``[num_blocks, page_bytes]`` as ``[num_blocks, *shape]`` of ``dtype``."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    if not count:
        return pages.new_empty((pages.shape[0], *shape), dtype=dtype)
    return pages[:, start : start + count].view(dtype).unflatten(1, shape)


def _sections(
    pages: torch.Tensor, stream: StreamFormat, at: StreamOffsets, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``[B, H, N, G, bytes]``, scales and zeros ``[B, H, G, N]``, outliers ``[B, H, O, N]`` as views of pages."""
    heads, groups, scales = stream.num_heads, stream.num_groups, stream.num_scales
    code_shape = (heads, block_size, groups, stream.row_bytes // groups)
    return (
        section(pages, at.codes, code_shape, torch.uint8),
        section(pages, at.scales, (heads, scales, block_size), torch.float16),
        section(pages, at.zeros, (heads, scales, block_size), torch.float16),
        section(pages, at.outliers, (heads, stream.outlier_channels, block_size), torch.float16),
    )


def store_latents(
    pages: torch.Tensor, layout: PageLayout, slot_mapping: torch.Tensor, latents: tuple[torch.Tensor, ...]
) -> None:
    """Quantize the latents of new tokens into their slots.

    Args:
        pages: ``[num_blocks, page_bytes]`` uint8; rows may be strided, bytes of a page are contiguous.
        layout: layout of the pages.
        slot_mapping: ``[>= num_tokens]`` int64, ``block * block_size + offset``; negative means padding, not stored.
            Only the first ``num_tokens`` entries count.
        latents: for every stream ``[num_tokens, num_heads, width]`` (or ``[num_tokens, num_heads * width]``).
    """
    slots = slot_mapping[: latents[0].shape[0]]
    kept = torch.nonzero(slots >= 0).squeeze(1)
    slots = slots[kept]
    for stream, at, x in zip(layout.streams, layout.offsets, latents, strict=True):
        x = x[kept].reshape(kept.numel(), stream.num_heads, stream.width)
        if isinstance(stream, AllocatedFormat):
            _store_allocated(pages, stream, at, layout.block_size, slots, x)
        else:
            store_uniform(pages, stream, at, layout.block_size, slots, x)


def load_latents(pages: torch.Tensor, layout: PageLayout, block_ids: torch.Tensor, stream_index: int) -> torch.Tensor:
    """Dequantize whole blocks; unwritten slots come back as whatever their bytes mean.

    Args:
        pages: ``[num_blocks, page_bytes]`` uint8.
        layout: layout of the pages.
        block_ids: ``[n]`` integer ids of the blocks to read; no other block is touched.
        stream_index: which stream of the layout.

    Returns:
        ``[n * block_size, num_heads, width]``, FP32.
    """
    stream, at = layout.streams[stream_index], layout.offsets[stream_index]
    if isinstance(stream, AllocatedFormat):
        within = torch.arange(layout.block_size, device=pages.device)
        slots = (block_ids.long().unsqueeze(1) * layout.block_size + within).flatten()
        return _load_allocated(pages, stream, at, layout.block_size, slots)
    codes, scales, zeros, outliers = _sections(pages[block_ids.long()], stream, at, layout.block_size)
    x = _dequantize(stream, codes, scales.permute(0, 1, 3, 2), zeros.permute(0, 1, 3, 2), outliers.permute(0, 1, 3, 2))
    return x.permute(0, 2, 1, 3).flatten(0, 1)


def load_slots(pages: torch.Tensor, layout: PageLayout, slots: torch.Tensor, stream_index: int) -> torch.Tensor:
    """Dequantize single slots.

    Args:
        pages: ``[num_blocks, page_bytes]`` uint8.
        layout: layout of the pages.
        slots: ``[n]`` integer, ``block * block_size + offset``, none negative.
        stream_index: which stream of the layout.

    Returns:
        ``[n, num_heads, width]``, FP32.
    """
    stream, at = layout.streams[stream_index], layout.offsets[stream_index]
    if isinstance(stream, AllocatedFormat):
        return _load_allocated(pages, stream, at, layout.block_size, slots)
    return load_uniform(pages, stream, at, layout.block_size, slots)


def store_uniform(
    pages: torch.Tensor,
    stream: StreamFormat,
    at: StreamOffsets,
    block_size: int,
    slots: torch.Tensor,
    x: torch.Tensor,
) -> None:
    """Quantize one uniform stream into slots.

    Args:
        pages: ``[num_blocks, page_bytes]`` uint8.
        stream: the stream.
        at: where its sections are.
        block_size: slots per page.
        slots: ``[n]`` integer, none negative.
        x: ``[n, num_heads, width]``.
    """
    block, offset = slots // block_size, slots % block_size
    code_view, scale_view, zero_view, outlier_view = _sections(pages, stream, at, block_size)
    if not stream.quantized:
        code_view[block, :, offset] = pack(to_fp16(x.float()).unflatten(-1, (-1, stream.group_size)), stream.bits)
        return
    codes, scales, zeros, outliers = quantize(x, stream.bits, stream.group_size, stream.outlier_channels)
    code_view[block, :, offset] = pack(codes, stream.bits)
    scale_view[block, :, :, offset] = scales
    zero_view[block, :, :, offset] = zeros
    if stream.outlier_channels:
        outlier_view[block, :, :, offset] = outliers


def load_uniform(
    pages: torch.Tensor, stream: StreamFormat, at: StreamOffsets, block_size: int, slots: torch.Tensor
) -> torch.Tensor:
    """Slots ``[n]`` of one uniform stream, see :func:`store_uniform`, as ``[n, num_heads, width]``, FP32."""
    block, offset = slots // block_size, slots % block_size
    codes, scales, zeros, outliers = _sections(pages, stream, at, block_size)
    return _dequantize(
        stream,
        codes[block, :, offset],
        scales[block, :, :, offset],
        zeros[block, :, :, offset],
        outliers[block, :, :, offset],
    )


def _dequantize(
    stream: StreamFormat, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, outliers: torch.Tensor
) -> torch.Tensor:
    """Bytes ``[..., groups, bytes]`` to FP32 latents ``[..., width]``."""
    unpacked = unpack(codes, stream.bits, stream.group_size)
    return dequantize(unpacked, scales, zeros, outliers) if stream.quantized else unpacked.float().flatten(-2)


def _allocated_sections(
    pages: torch.Tensor, stream: AllocatedFormat, at: StreamOffsets, block_size: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Per head codes ``[B, N, bytes]``, and scales ``[B, H, N]``, as views of pages."""
    codes, start = [], at.codes
    for runs in stream.runs:
        codes.append(section(pages, start, (block_size, run_bytes(runs)), torch.uint8))
        start += block_size * run_bytes(runs)
    return codes, section(pages, at.scales, (stream.num_heads, block_size), torch.uint8)


def _store_allocated(
    pages: torch.Tensor,
    stream: AllocatedFormat,
    at: StreamOffsets,
    block_size: int,
    slots: torch.Tensor,
    x: torch.Tensor,
) -> None:
    """Quantize ``[n, num_heads, width]`` into slots."""
    block, offset = slots // block_size, slots % block_size
    code_views, scale_view = _allocated_sections(pages, stream, at, block_size)
    for head, runs in enumerate(stream.runs):
        codes, scales = quantize_allocated(x[:, head], runs)
        parts = codes.split([channels for _, channels in runs], -1)
        packed = [pack(part, bits) for part, (bits, _) in zip(parts, runs, strict=True)]
        code_views[head][block, offset] = torch.cat(packed, -1)
        scale_view[block, head, offset] = scales


def _load_allocated(
    pages: torch.Tensor, stream: AllocatedFormat, at: StreamOffsets, block_size: int, slots: torch.Tensor
) -> torch.Tensor:
    """Slots ``[n]`` to ``[n, num_heads, width]``, FP32."""
    block, offset = slots // block_size, slots % block_size
    code_views, scale_view = _allocated_sections(pages, stream, at, block_size)
    heads = []
    for head, runs in enumerate(stream.runs):
        parts = code_views[head][block, offset].split([packed_size(channels, bits) for bits, channels in runs], -1)
        codes = [unpack(part, bits, channels) for part, (bits, channels) in zip(parts, runs, strict=True)]
        heads.append(dequantize_allocated(torch.cat(codes, -1), scale_view[block, head, offset], runs, stream.width))
    return torch.stack(heads, 1)
