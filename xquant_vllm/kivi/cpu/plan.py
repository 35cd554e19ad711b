"""A KIVI layer's plan as the C++ kernels want it."""

import ctypes

from xquant_vllm.attention.cpu.abi import Latent, Plan, Stream, Term
from xquant_vllm.attention.cpu.plan import set_rope
from xquant_vllm.attention.cpu.streams import cpu_stream
from xquant_vllm.attention.cpu.tensors import dtype_number
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.kivi.cpu.abi import KiviPlan
from xquant_vllm.kivi.plan import KiviLayerPlan


class KiviCpuPlan:
    """The C struct of a plan, and what it points to.

    Attributes:
        pointer: what the library is called with.
        page_bytes: bytes of a quantized page.
        residual_page_bytes: bytes of a residual page.
        elements: numbers of a token's keys, or of its values.
        heads: query heads and their size.
    """

    def __init__(self, plan: KiviLayerPlan) -> None:
        """Describe the values to the kernels as a latent that needs no up-projection."""
        quantized, residual = plan.quantized, plan.residual
        values = cpu_stream(quantized.value_stream, quantized.values_at, quantized.block_size)
        streams, terms = (Stream * 1)(values.struct), (Term * 1)(Term(values.struct, 0, 0))
        layer = Plan(
            streams=streams,
            num_streams=1,
            value=Latent(terms, 1, plan.num_kv_heads, plan.head_size),
            block_size=quantized.block_size,
            num_heads=plan.num_heads,
            num_kv_heads=plan.num_kv_heads,
            head_size=plan.head_size,
            sliding_window=plan.sliding_window or 0,
            scale=plan.scale,
            soft_cap=plan.logits_soft_cap or 0.0,
        )
        self._kept: list[object] = [values, streams, terms]
        if plan.rope is not None and plan.rope.rotary_size:
            self._kept.append(set_rope(layer, plan.rope))
        self._struct = KiviPlan(
            layer=layer,
            key_bits=quantized.bits,
            key_group_size=quantized.key_group_size,
            key_codes=quantized.key_codes_at,
            key_scales=quantized.key_scales_at,
            key_zeros=quantized.key_zeros_at,
            residual_block_size=residual.block_size,
            residual_values=residual.values_at,
            residual_dtype=dtype_number(residual.dtype),
            residual_tokens=plan.residual_tokens,
            exact_step=int(plan.exact_step),
        )
        self.pointer = ctypes.byref(self._struct)
        self.page_bytes, self.residual_page_bytes = quantized.page_bytes, residual.page_bytes
        self.elements = plan.num_kv_heads * plan.head_size
        self.heads = (plan.num_heads, plan.head_size)


@per_object
def prepare(plan: KiviLayerPlan) -> KiviCpuPlan:
    """The plan for these kernels, made on first use and forgotten together with ``plan``."""
    return KiviCpuPlan(plan)
