"""What the attention kernels read of a layer's plan: tensors on the device, and what they are compiled for."""

import torch

from xquant_vllm.attention.gpu.device.rematerialize import KeyTail
from xquant_vllm.attention.gpu.limits import refuse_wide_float32, shared_memory
from xquant_vllm.attention.gpu.operands import product_dtype, tokens_of_tile
from xquant_vllm.attention.gpu.tables.head_tables import head_tables, refusal
from xquant_vllm.attention.gpu.tables.input_projection import of_inputs
from xquant_vllm.attention.gpu.tables.latent_tables import band_factors, latent_tables
from xquant_vllm.attention.gpu.tables.pairs import arranged, pair_columns, plain_columns
from xquant_vllm.attention.gpu.tables.run_fields import merged_fields
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import PageLayout, StreamFormat

# Channels of a band, at most. With 128 of keys the unpacking of a tile took more registers than there are.
_KEY_BAND, _VALUE_BAND = 64, 128
_SMALLEST_BAND = 16
# Of the shared memory that a program may have, what the rows of up-projections may take that a band meets: queries and
# keys of FP32 need more of the rest.
_SHARE_OF_BAND = {2: 1 / 3, 4: 1 / 6}
# Value latents up to this many channels are weighed as they are: their sums stay in registers.
_MOST_ABSORBED = 256


class GpuPlan:
    """What kernels read of a layer's plan, for operands of one dtype. It does not hold the plan itself.

    Attributes:
        dtype: of the products' operands.
        half: columns of half a head.
        tokens: cached tokens of a tile.
        columns: int32 ``[2 * half]``: channels of queries and keys in the kernels' order; -1 is padding.
        value_columns: int32 ``[2 * half]``: channels of values and outputs, which are in the model's order.
        key: the key latents, times the up-projection.
        value: the value latents, times the up-projection; times the identity where they are the values.
        value_factors: FP32 ``[num_kv_heads, 2 * half]``, see ``band_factors`` in tables/latent_tables.py; read unless
            ``project_value``.
        tail: bias, norm and RoPE of keys.
        value_bias: FP32 ``[num_kv_heads, 2 * half]``.
        sinks: FP32 ``[num_heads]``.
        absorb_key: whether queries score against latents.
        absorb_value: whether latents are weighed instead of values.
        project_value: whether value latents are multiplied by a matrix at all. Those that are the values are
            multiplied by the identity if they are several bands, or have outliers.
        shared: whether keys and values are projections of one latent whose bands are alike, so that it is unpacked
            once; values are then not absorbed.
        rotates: whether any pair of a key's channels rotates.
        norm: whether keys have a norm.
        has_key_bias: whether keys have a bias that can be seen in the output.
        has_value_bias: whether values have a bias.
        general_because: why decoding takes ``attend``, the kernel for every format; None where it takes
            ``attend_heads``, that for latents per head.
        heads: what ``attend_heads`` reads, or None.
        fields: what sums of ``attend_heads`` are multiplied by where they are over fields, or None.
        exact_key: what multiplies the tokens of a step that are attended to exactly, or None.
        exact_value: the same for values.
    """

    def __init__(self, plan: AttentionLayerPlan, dtype: torch.dtype) -> None:
        """Arrange everything; refuses what the kernels cannot do.

        Raises:
            ValueError: with the reason.
        """
        projection = plan.projection
        self.dtype = dtype
        device, head_size = plan.device, projection.head_size
        if head_size % 2 or head_size > 256:
            raise ValueError(f"head_size = {head_size} is not supported: it must be even and at most 256")
        rope = projection.rope if projection.rope is not None and projection.rope.rotary_size else None
        norm = projection.key_norm
        self.absorb_key = rope is None and norm is None and not plan.key_bias_matters
        columns = pair_columns(head_size, rope)
        self.half = columns.numel() // 2
        self.tokens = tokens_of_tile(self.half)
        value_columns = plain_columns(head_size, self.half)
        self.absorb_value = _one_scale(plan.layouts, plan.value_terms, projection.value_width)
        self.project_value = projection.up_value is not None or not self.absorb_value
        self.shared = plan.key_terms == plan.value_terms and not self.absorb_value
        if self.shared:
            refuse_wide_float32(dtype, 2 * self.half, device)
        row_bytes = 2 * self.half * dtype.itemsize * (1 + self.shared)
        fitting = int(_SHARE_OF_BAND[dtype.itemsize] * shared_memory(device)) // row_bytes
        key_band, value_band = (_power_of_two(min(most, fitting)) for most in (_KEY_BAND, _VALUE_BAND))
        up_value = projection.up_value
        if up_value is None:
            up_value = torch.eye(head_size).expand(projection.num_kv_heads, -1, -1)
        self.key = latent_tables(
            plan.layouts, plan.key_terms, arranged(projection.up_key.to(device), columns), dtype, key_band
        )
        self.value = latent_tables(
            plan.layouts,
            plan.value_terms,
            arranged(up_value.to(device), value_columns),
            dtype,
            at_most=_MOST_ABSORBED if self.absorb_value else key_band if self.shared else value_band,
        )
        nothing = torch.zeros(1, device=device)
        self.value_factors = nothing
        if not self.project_value:
            factors = band_factors(plan.layouts, plan.value_terms, projection.num_kv_heads, 2 * self.half)
            self.value_factors = factors.to(device)
        self.tail = KeyTail(
            bias=nothing if projection.key_bias is None else arranged(projection.key_bias, columns).contiguous(),
            norm=nothing if norm is None else arranged(norm.weights(projection.num_kv_heads), columns).contiguous(),
            eps=0.0 if norm is None else norm.eps,
            cos=nothing if rope is None else rope.cos.contiguous(),
            sin=nothing if rope is None else rope.sin.contiguous(),
            rotating=0 if rope is None else rope.rotary_size // 2,
            head_size=head_size,
        )
        self.rotates, self.norm = rope is not None, norm is not None
        self.has_key_bias = projection.key_bias is not None and not self.absorb_key
        self.has_value_bias = projection.value_bias is not None
        self.value_bias = (
            nothing if projection.value_bias is None else arranged(projection.value_bias, value_columns).contiguous()
        )
        self.sinks = nothing if plan.sinks is None else plan.sinks
        self.columns, self.value_columns = columns.to(device), value_columns.to(device)
        self.general_because = refusal(plan, dtype)
        self.heads = None if self.general_because else head_tables(plan, columns)
        self.fields = None
        values = plan.layouts[plan.value_terms[0].page].streams[plan.value_terms[0].stream]
        if self.heads is not None and (isinstance(values, AllocatedFormat) or values.bits == 3):
            matrix = None if projection.up_value is None else arranged(projection.up_value.to(device), value_columns)
            self.fields = merged_fields(values, matrix, 2 * self.half, dtype, device)
        self.exact_key = self.exact_value = None
        if plan.exact_from is not None:
            self.exact_key = of_inputs(plan, plan.key_terms, projection.up_key, columns, dtype)
            self.exact_value = of_inputs(plan, plan.value_terms, up_value, value_columns, dtype)


def _power_of_two(channels: int) -> int:
    """The largest that is no larger, but at least what products take."""
    return max(_SMALLEST_BAND, 1 << (channels.bit_length() - 1))


def _one_scale(layouts: tuple[PageLayout, ...], terms: tuple[LatentTerm, ...], width: int) -> bool:
    """Whether a latent is one band without outliers."""
    if len(terms) != 1 or width > _MOST_ABSORBED:
        return False
    stream = layouts[terms[0].page].streams[terms[0].stream]
    return not isinstance(stream, StreamFormat) or (stream.num_groups == 1 and not stream.outlier_channels)


@per_object
def _gpu_plan(plan: AttentionLayerPlan, dtype: torch.dtype) -> GpuPlan:
    return GpuPlan(plan, dtype)


def prepare(plan: AttentionLayerPlan, dtype: torch.dtype) -> GpuPlan:
    """What kernels read of a plan, made on first use and forgotten together with the plan.

    Args:
        plan: the layer's plan.
        dtype: of the queries.
    """
    return _gpu_plan(plan, product_dtype(dtype))
