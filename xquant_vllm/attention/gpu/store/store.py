"""Quantizing what new tokens bring into their slots, through the Triton kernels.

Nothing is read back from the device, nothing depends on data and nothing is allocated beside the workspace, so a CUDA
graph can hold these calls.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from xquant_vllm.attention.gpu import workspace
from xquant_vllm.attention.gpu.arguments import describe_latent
from xquant_vllm.attention.gpu.operands import STORES, operand_type
from xquant_vllm.attention.gpu.page_pointers import page_pointers
from xquant_vllm.attention.gpu.store.predict import subtract_product, subtract_terms
from xquant_vllm.attention.gpu.store.quantize import quantize
from xquant_vllm.attention.gpu.store.rotate import Rotation, rotate
from xquant_vllm.attention.gpu.store.store_rotated import store_rotated
from xquant_vllm.attention.gpu.store.store_tables import prepare_store
from xquant_vllm.attention.gpu.tables.latent_tables import ALLOCATED, FP16, UNIFORM
from xquant_vllm.attention.gpu.tables.prediction_tables import PredictionTables
from xquant_vllm.attention.gpu.tables.rotation_tables import RotationTables
from xquant_vllm.attention.gpu.tables.stream_tables import StreamTables
from xquant_vllm.attention.plan import AttentionLayerPlan

# From so many tokens on a program has several: there are programs enough.
_MANY_TOKENS = 256
# Of many tokens, numbers of a tile that is quantized, unless a scale group has more; and bytes that are packed at once.
_TILE, _BYTES = {FP16: 256, UNIFORM: 512, ALLOCATED: 256}, 512
# Of these numbers, those of a warp, of few tokens and of many: choosing a scale among several takes more registers.
_OF_WARP = {FP16: (256, 256), UNIFORM: (128, 512), ALLOCATED: (64, 64)}
# Numbers of a rotated token that are quantized at once, unless a scale group has more.
_AT_ONCE = 2048
# FP32 operands as three products of TF32: codes are exact in TF32, so are +1 and -1, and of the other factor 22 bits
# are left of 24. Exact products spill registers, and readers do not repeat these: what they round is stored as well.
_PRECISION = "tf32x3"
_COLUMNS = 64


def store(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    slot_mapping: torch.Tensor,
    inputs: Sequence[torch.Tensor],
) -> None:
    """Quantize what new tokens bring into their slots; see :func:`reference.store`."""
    tokens = inputs[0].shape[0]
    if not tokens:
        return
    of_plan = prepare_store(plan)
    block_size = plan.layout.block_size
    parts = workspace_parts(plan, tokens)
    computed = workspace.take(pages[0].device, *parts)[0] if parts else None
    for index, (stream, x) in enumerate(zip(plan.layout.streams, inputs, strict=True)):
        rows, tables = _rows(x, index, stream.num_heads * stream.width), of_plan.streams[index]
        if index == 0 and computed is not None:
            if of_plan.rotation is not None:
                if of_plan.prediction is None:
                    _store_rotated(rows, slot_mapping, of_plan.rotation, computed, pages[0], block_size, tables)
                    continue
                _rotate(rows, slot_mapping, of_plan.rotation, computed)
                rows = computed
            if of_plan.prediction is not None:
                _subtract(rows, slot_mapping, pages, plan, of_plan.prediction, computed)
                rows = computed
        _quantize(rows, slot_mapping, pages[0], block_size, tables)


def workspace_parts(plan: AttentionLayerPlan, tokens: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of what :func:`store` takes of the workspace: rows that are computed before they are stored."""
    if plan.rotation is None and plan.prediction is None:
        return ()
    first = plan.layout.streams[0]
    rows = tokens
    if plan.prediction is None:
        # Of fewer tokens programs may have one each.
        rows = max(min(tokens, _MANY_TOKENS), triton.cdiv(tokens, _rotated_by_program(tokens, _rotation(plan))))
    return (((rows, first.num_heads * first.width), torch.float32),)


def _rows(x: torch.Tensor, index: int, width: int) -> torch.Tensor:
    """``[tokens, width]`` with contiguous channels; a view, where channels are contiguous already."""
    operand_type(x.dtype, f"input {index}")
    rows = x.flatten(1)
    if rows.shape[1] != width:
        raise ValueError(f"input {index} has {rows.shape[1]} numbers per token, the stream has {width}")
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _rotation(plan: AttentionLayerPlan) -> RotationTables:
    tables = prepare_store(plan).rotation
    assert tables is not None
    return tables


def _is_large(tables: RotationTables) -> bool:
    return tables.left.shape[0] * tables.right.shape[0] > 4096


def _rotated_by_program(tokens: int, tables: RotationTables) -> int:
    """A program of several tokens keeps the matrices in shared memory, which larger ones do not fit."""
    return 8 if tokens >= _MANY_TOKENS and not _is_large(tables) else 1


def _rotation_arguments(tables: RotationTables, dtype: torch.dtype) -> tuple[Rotation, dict[str, Any]]:
    compiled = {
        # Triton's interpreter has no products of BF16.
        "DTYPE": tl.float32 if triton.knobs.runtime.interpret else operand_type(dtype),
        "PRECISION": _PRECISION,
        **STORES,
    }
    return Rotation(tables.signs, tables.left, tables.right, tables.rows, tables.columns), compiled


def _rotate(rows: torch.Tensor, slots: torch.Tensor, tables: RotationTables, rotated: torch.Tensor) -> None:
    """Into ``rotated``, FP32 ``[tokens, width]``; rows of tokens that are not stored are left alone."""
    tokens = rows.shape[0]
    of_program = _rotated_by_program(tokens, tables)
    rotation, compiled = _rotation_arguments(tables, rows.dtype)
    rotate[(triton.cdiv(tokens, of_program),)](
        rows,
        rows.stride(0),
        slots,
        tokens,
        rotation,
        rotated,
        TOKENS=of_program,
        ROWS=tables.left.shape[0],
        COLUMNS=tables.right.shape[0],
        num_warps=8 if _is_large(tables) else 4,
        **compiled,
    )


def _store_rotated(
    rows: torch.Tensor,
    slots: torch.Tensor,
    rotation_tables: RotationTables,
    scratch: torch.Tensor,
    pages: torch.Tensor,
    block_size: int,
    tables: StreamTables,
) -> None:
    tokens = rows.shape[0]
    of_program = _rotated_by_program(tokens, rotation_tables)
    rotation, compiled = _rotation_arguments(rotation_tables, rows.dtype)
    num_scale_groups = tables.scale_groups.shape[0]
    store_rotated[(triton.cdiv(tokens, of_program),)](
        rows,
        rows.stride(0),
        slots,
        tokens,
        rotation,
        scratch,
        pages,
        pages.stride(0),
        block_size,
        tables.scale_groups,
        num_scale_groups,
        tables.bytes,
        tables.channels,
        TOKENS=of_program,
        ROTATION_ROWS=rotation_tables.left.shape[0],
        ROTATION_COLUMNS=rotation_tables.right.shape[0],
        SCALE_GROUPS=max(1, min(triton.next_power_of_2(num_scale_groups), _AT_ONCE // tables.width)),
        num_warps=8,
        **_quantizing(tables),
        **compiled,
    )


def _subtract(
    rows: torch.Tensor,
    slots: torch.Tensor,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    tables: PredictionTables,
    result: torch.Tensor,
) -> None:
    """Rows minus their prediction into ``result``, FP32 ``[tokens, width]``, which may be the rows themselves.

    Rows of tokens that are not stored are left alone.
    """
    tokens, own = rows.shape[0], plan.layout.streams[0]
    latent = tables.latent
    of_pages = page_pointers(pages, plan.layout.block_size)
    arguments = (rows, rows.stride(0), slots, tokens, of_pages, describe_latent(latent))
    compiled = {
        "WIDTH": latent.width,
        "KINDS": latent.kinds,
        "HIGH": latent.high,
        "OUTLIERS": latent.most_outliers,
        **STORES,
    }
    if tables.segments is not None:
        of_program = 8 if tokens >= _MANY_TOKENS else 1
        subtract_terms[(triton.cdiv(tokens, of_program), tables.segments.shape[0])](
            *arguments, tables.segments, tables.order, result, result.stride(0), TOKENS=of_program, **compiled
        )
    else:
        of_program = 32 if tokens >= _MANY_TOKENS else 16
        subtract_product[(triton.cdiv(tokens, of_program), own.num_heads, triton.cdiv(own.width, _COLUMNS))](
            *arguments,
            result,
            result.stride(0),
            own.width,
            TOKENS=of_program,
            COLUMNS=_COLUMNS,
            PRECISION=_PRECISION,
            num_warps=of_program // 4,
            num_stages=2,
            **compiled,
        )


def _quantize(
    rows: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor, block_size: int, tables: StreamTables
) -> None:
    tokens = rows.shape[0]
    many = tokens >= _MANY_TOKENS
    of_program = max(1, _TILE[tables.kind] // tables.width) if many else 1
    quantize[(triton.cdiv(tokens, of_program), tables.scale_groups.shape[0])](
        rows,
        rows.stride(0),
        slots,
        tokens,
        pages,
        pages.stride(0),
        block_size,
        tables.scale_groups,
        tables.bytes,
        tables.channels,
        TOKENS=of_program,
        num_warps=max(1, min(8, of_program * tables.width // _OF_WARP[tables.kind][many])),
        **_quantizing(tables),
        **STORES,
    )


def _quantizing(tables: StreamTables) -> dict[str, Any]:
    """What kernels that quantize a stream are compiled for."""
    return {
        "WIDTH": tables.width,
        "ROW_BYTES": tables.row_bytes,
        "BYTES": min(tables.row_bytes, _BYTES),
        "CODES_PER_BYTE": tables.codes_per_byte,
        "KIND": tables.kind,
        "LARGEST": tables.largest,
        "OUTLIERS": tables.outliers,
    }
