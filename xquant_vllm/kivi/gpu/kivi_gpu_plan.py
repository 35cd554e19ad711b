"""What KIVI's kernels read of a layer's plan: tensors on the device, and what they are compiled for."""

import math
from typing import Any

import torch
import triton

from xquant_vllm.attention.gpu.device.rematerialize import KeyTail
from xquant_vllm.attention.gpu.limits import refuse_wide_float32
from xquant_vllm.attention.gpu.operands import operand_type, product_dtype, tokens_of_tile
from xquant_vllm.attention.gpu.tables.pairs import pair_columns
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.kivi.pages import QuantizedLayout
from xquant_vllm.kivi.plan import KiviLayerPlan

# Channels of a row of products at least.
_FEWEST_COLUMNS = 16


class KiviGpuPlan:
    """What kernels read of a layer's plan, for operands of one dtype. It does not hold the plan itself.

    Attributes:
        dtype: of the products' operands.
        columns: int32 ``[2 * half]``: channels of queries and keys in halves that pair up under RoPE; -1 is padding.
        value_columns: int32 ``[value_width]``: channels of values and outputs, every group padded to a power of two.
        half: columns of half a key.
        value_width: columns of a value.
        tail: RoPE of keys.
        constants: what attention is compiled for, for this layer.
    """

    def __init__(self, plan: KiviLayerPlan, dtype: torch.dtype, device: torch.device) -> None:
        """Arrange everything; refuses what the kernels cannot do.

        Raises:
            ValueError: with the reason.
        """
        if plan.head_size > 256:
            raise ValueError(f"head_size = {plan.head_size} is not supported: the kernels take 256 at most")
        self.dtype = dtype
        layout = plan.quantized
        rope = plan.rope if plan.rope is not None and plan.rope.rotary_size else None
        columns = pair_columns(plan.head_size, rope)
        natural = torch.equal(columns, pair_columns(plan.head_size, None))
        self.half = columns.numel() // 2
        refuse_wide_float32(dtype, 2 * self.half, device)
        self.columns = columns.to(device)
        self.value_columns = value_columns(layout).to(device)
        self.value_width = self.value_columns.numel()
        nothing = torch.zeros(1, device=device)
        self.tail = KeyTail(
            bias=nothing,
            norm=nothing,
            eps=0.0,
            cos=nothing if rope is None else rope.cos.to(device).contiguous(),
            sin=nothing if rope is None else rope.sin.to(device).contiguous(),
            rotating=0 if rope is None else rope.rotary_size // 2,
            head_size=plan.head_size,
        )
        groups, channels = padded_groups(layout)
        self.constants: dict[str, Any] = page_constants(plan) | {
            "KEY_GROUP": layout.key_group_size,
            "VALUE_GROUP": layout.value_group_size,
            # A tile lies in one group of keys, hence in one quantized page.
            "TOKENS": math.gcd(layout.key_group_size, tokens_of_tile(self.half)),
            "HALF": self.half,
            "VALUE_GROUPS": groups,
            "VALUE_CHANNELS": channels,
            "NATURAL": natural,
            "ROPE": rope is not None,
        }


def page_constants(plan: KiviLayerPlan) -> dict[str, Any]:
    """What all kernels are compiled for: both kinds of pages."""
    return {
        "HEAD_SIZE": plan.head_size,
        "BITS": plan.quantized.bits,
        "RESIDUAL": operand_type(plan.residual.dtype),
    }


def padded_groups(layout: QuantizedLayout) -> tuple[int, int]:
    """Groups of a value and channels of a group, both powers of two, padding included."""
    groups = triton.next_power_of_2(layout.value_stream.num_groups)
    channels = triton.next_power_of_2(layout.value_group_size)
    return groups, max(channels, _FEWEST_COLUMNS // groups)


def value_columns(layout: QuantizedLayout) -> torch.Tensor:
    """Channels of a value in the order of the kernels, int32; -1 is padding."""
    groups, channels = padded_groups(layout)
    size = layout.value_group_size
    group, within = torch.arange(groups)[:, None], torch.arange(channels)
    there = (group < layout.value_stream.num_groups) & (within < size)
    return torch.where(there, group * size + within, -1).flatten().to(torch.int32)


@per_object
def _kivi_gpu_plan(plan: KiviLayerPlan, dtype: torch.dtype, device: torch.device) -> KiviGpuPlan:
    return KiviGpuPlan(plan, dtype, device)


def prepare(plan: KiviLayerPlan, dtype: torch.dtype, device: torch.device) -> KiviGpuPlan:
    """What kernels read of a plan, made on first use and forgotten together with the plan.

    Args:
        plan: the layer's plan.
        dtype: of the queries.
        device: of the pages.
    """
    return _kivi_gpu_plan(plan, product_dtype(dtype), device)
