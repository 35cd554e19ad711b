"""Dtypes of the products' operands, as Triton names them."""

import torch
import triton.language as tl

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype.

    Raises:
        ValueError: kernels have no products of it.
    """
    if dtype not in _TYPES:
        raise ValueError(f"query is {dtype}: the kernels take float16, bfloat16 and float32")
    return _TYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """How products are computed: FP32 operands exactly, others as they are."""
    return "ieee" if dtype == torch.float32 else "tf32"
