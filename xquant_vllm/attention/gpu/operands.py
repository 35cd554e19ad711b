"""Dtypes of the products' operands, as Triton names them, how kernels round, and the tiles that they go by."""

from typing import Any

import torch
import triton
import triton.language as tl

# Cached tokens of a tile that is unpacked, and how programs that unpack are launched. With 64 tokens and 4 warps the
# addresses of the codes alone take more registers than there are (1 KB of spills a thread for compute capability 9.0).
_TOKENS, _TOKENS_OF_WIDE_HEADS, _WIDE = 32, 16, 128
LAUNCH = {"num_warps": 8, "num_stages": 2}

# Whether a product and the sum that it goes into may be rounded once, together. Triton's default is yes up to 3.9, and
# from 3.10 on no, so every launch says which. Kernels that store round both, as the reference does: what is in pages
# must not depend on Triton's version. Kernels that attend round once: faster, and nobody keeps what they compute.
STORES: dict[str, Any] = {"enable_fp_fusion": False}
ATTENDS: dict[str, Any] = {"enable_fp_fusion": True}

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def tokens_of_tile(half: int) -> int:
    """Cached tokens of a tile, of heads of ``2 * half`` columns: those of wide heads take more registers."""
    return _TOKENS_OF_WIDE_HEADS if 2 * half > _WIDE else _TOKENS


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the products' operands, for queries of a dtype; Triton's interpreter has no products of BF16."""
    return torch.float32 if dtype == torch.bfloat16 and triton.knobs.runtime.interpret else dtype


def operand_type(dtype: torch.dtype, what: str = "query") -> tl.dtype:
    """Triton's name of a dtype; ``what`` has it.

    Raises:
        ValueError: kernels have no products of it.
    """
    if dtype not in _TYPES:
        raise ValueError(f"{what} in {dtype}: the kernels take float16, bfloat16 and float32")
    return _TYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """How products are computed: FP32 operands exactly, others as they are."""
    return "ieee" if dtype == torch.float32 else "tf32"
