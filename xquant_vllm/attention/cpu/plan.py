"""A layer's plan as the C++ kernels want it: structs, and tensors in the order in which they are read."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from xquant_vllm.attention.cpu.abi import Latent, Plan, Stream, Term
from xquant_vllm.attention.cpu.byte_keys import ByteKeys, byte_keys, has_byte_keys, shares_latents
from xquant_vllm.attention.cpu.integers import IntegerKeys, integer_keys
from xquant_vllm.attention.cpu.streams import LANES, CpuStream, cpu_stream
from xquant_vllm.attention.cpu.tensors import page_structs
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.projection.rope import RotaryTable


class CpuPlan:
    """The C struct of a plan, and the tensors that it points to.

    Attributes:
        struct: the struct.
        pointer: what the library is called with.
        page_bytes: bytes of a page, for the layer's own pages and for those that it reads too.
        input_elements: channels of all heads, for every stream of the own pages.
        heads: query heads and their size.
        integer_keys: the key up-projection in integers, or None.
        byte_keys: likewise in 8 bits, for latents that kv heads share, or None.
    """

    def __init__(self, plan: AttentionLayerPlan, with_integers: bool = False, with_tiles: bool = False) -> None:
        """Check the plan and rearrange what the kernels read in another order.

        Args:
            plan: the plan.
            with_integers: for kernels that multiply integers (csrc/cpu/attention/integer.h).
            with_tiles: for kernels that multiply them in tiles (csrc/cpu/tiles).
        """
        layout, projection = plan.layout, plan.projection
        kv_heads, head_size = projection.num_kv_heads, projection.head_size
        key_width, value_width = projection.up_key.shape[1], projection.value_width
        if head_size % 8:
            raise ValueError(f"head_size = {head_size} is not supported: it must be a multiple of 8")
        if kv_heads <= 0 or plan.num_heads % kv_heads:
            raise ValueError(f"num_heads = {plan.num_heads} is not a multiple of the {kv_heads} kv heads")
        norm, rope = projection.key_norm, projection.rope
        rotates = rope is not None and rope.rotary_size > 0

        self.integer_keys: IntegerKeys | None = None
        self.byte_keys: ByteKeys | None = None
        self._kept: list[object] = []
        self._pages: tuple[Any, tuple[Any, int]] = (None, (None, 0))
        self._streams: dict[tuple[int, int], CpuStream] = {}
        # Exact tokens come as keys, not as latents.
        absorbed = norm is None and not rotates and not plan.key_bias_matters and plan.exact_from is None
        up_key = fp32("up_key", projection.up_key, (kv_heads, key_width, head_size))
        struct = Plan(
            streams=self._array(Stream, [self._stream(plan, 0, index) for index in range(len(layout.streams))]),
            num_streams=len(layout.streams),
            key=self._latent(plan, plan.key_terms, key_width),
            value=self._latent(plan, plan.value_terms, value_width),
            block_size=layout.block_size,
            num_heads=plan.num_heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            key_absorbed=int(absorbed),
            up_key=self._tensor(_padded(up_key.transpose(1, 2)) if absorbed else up_key),
            scale=plan.scale,
            sliding_window=plan.sliding_window or 0,
            soft_cap=plan.logits_soft_cap or 0.0,
        )
        if projection.up_value is not None:
            up_value = fp32("up_value", projection.up_value, (kv_heads, value_width, head_size))
            struct.up_value = self._tensor(_padded(up_value))
        self._with_tiles = with_tiles
        self._share_latents(struct, plan, up_key, with_integers and not absorbed)
        if with_integers and not absorbed and not struct.shares_latents:
            self._add_integers(struct, up_key)
        if projection.key_bias is not None and not absorbed:
            struct.key_bias = self._tensor(fp32("key_bias", projection.key_bias, (kv_heads, head_size)))
        if projection.value_bias is not None:
            struct.value_bias = self._tensor(fp32("value_bias", projection.value_bias, (kv_heads, head_size)))
        if norm is not None:
            struct.key_norm = self._tensor(fp32("key_norm.weight", norm.weights(kv_heads), (kv_heads, head_size)))
            struct.key_norm_eps = norm.eps
        if plan.sinks is not None:
            struct.sinks = self._tensor(fp32("sinks", plan.sinks, (plan.num_heads,)))
        if rope is not None and rotates:
            self._kept.append(set_rope(struct, rope))
        self._add_store(struct, plan)
        self.struct = struct
        self.pointer = ctypes.byref(struct)
        self.page_bytes = [pages.page_bytes for pages in plan.layouts]
        self.input_elements = [stream.num_heads * stream.width for stream in layout.streams]
        self.heads = (plan.num_heads, head_size)

    def structs_of(self, pages: Sequence[torch.Tensor]) -> tuple[Any, int]:
        """See :func:`page_structs`; a tuple that comes again, as a layer's pages do, is looked at once."""
        if pages is not self._pages[0]:
            structs = page_structs(self.page_bytes, pages)
            if not isinstance(pages, tuple):  # a list may hold others next time
                return structs
            self._pages = (pages, structs)
        return self._pages[1]

    def _share_latents(self, struct: Plan, plan: AttentionLayerPlan, up_key: torch.Tensor, with_integers: bool) -> None:
        """Let kv heads share what is unpacked, unless integer.h multiplies the codes of one term as they are."""
        if with_integers and has_byte_keys(plan):
            keys = self.byte_keys = byte_keys(up_key, self._with_tiles)
            if self._with_tiles:
                struct.key_byte_tiles = self._tensor(keys.integers)
            else:
                struct.key_bytes = self._tensor(keys.integers)
            struct.key_byte_offsets = self._tensor(keys.offsets)
            struct.key_byte_units = self._tensor(keys.units)
        codes = with_integers and not any(term.adds for term in plan.key_terms)
        struct.shares_latents = int(shares_latents(plan) and (self.byte_keys is not None or not codes))

    def _add_integers(self, struct: Plan, up_key: torch.Tensor) -> None:
        keys = self.integer_keys = integer_keys(up_key, struct.key)
        struct.key_integers = self._tensor(keys.integers)
        struct.key_words = self._tensor(keys.words)
        struct.key_units = self._tensor(keys.units)
        struct.key_sums = self._tensor(keys.sums)
        struct.key_scale_groups = keys.units.shape[1]
        if self._with_tiles:
            struct.key_tiles = self._tensor(keys.tiles)
            struct.key_first_tiles = self._tensor(keys.first_tiles)

    def _add_store(self, struct: Plan, plan: AttentionLayerPlan) -> None:
        """What happens to the first stream's input before it is quantized."""
        own = plan.layout.streams[0]
        if plan.rotation is not None:
            rotation, blocks = plan.rotation, own.width // plan.rotation.block
            if own.num_heads != 1 or rotation.size != own.width:
                raise ValueError(
                    f"a rotation of {rotation.size} channels does not fit {own.num_heads} x {own.width} channels"
                )
            struct.rotation_signs = self._tensor(fp32("rotation.signs", rotation.signs, (own.width,)))
            struct.rotation_mix = self._tensor(fp32("rotation.mix", rotation.mix, (blocks, blocks)))
            struct.rotation_block = rotation.block
        if plan.prediction is not None:
            matrix = plan.prediction.matrix
            width = own.width if matrix is None else matrix.shape[1]
            struct.prediction = self._latent(plan, plan.prediction.terms, width)
            if matrix is not None:
                exact = fp32("prediction.matrix", matrix, (own.num_heads, width, own.width))
                struct.prediction_matrix = self._tensor(_padded(exact))

    def _latent(self, plan: AttentionLayerPlan, terms: tuple[LatentTerm, ...], width: int) -> Latent:
        structs, num_heads = [], 1
        for term in terms:
            stream = self._stream(plan, term.page, term.stream)
            structs.append(Term(stream, term.page, int(term.adds)))
            num_heads = stream.num_heads
        return Latent(self._array(Term, structs), len(structs), num_heads, width)

    def _stream(self, plan: AttentionLayerPlan, page: int, index: int) -> Stream:
        stream = self._streams.get((page, index))
        if stream is None:
            layout = plan.layouts[page]
            stream = cpu_stream(layout.streams[index], layout.offsets[index], layout.block_size)
            self._streams[page, index] = stream
        return stream.struct

    def _tensor(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _array(self, kind: Any, elements: list[Any]) -> Any:
        array = (kind * len(elements))(*elements)
        self._kept.append(array)
        return array


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """Rows lengthened by zeros to a multiple of the lanes."""
    missing = -tensor.shape[-1] % LANES
    return (F.pad(tensor, (0, missing)) if missing else tensor).contiguous()


def fp32(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``tensor``, contiguous; refuses another dtype, device or shape by ``name``."""
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be FP32 {list(shape)} on the CPU, not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    return tensor.contiguous()


# Layers share a rotary table, so its rearranged copy is shared as well.
@per_object
def tiled_table(table: RotaryTable) -> torch.Tensor:
    """Cosines and sines as ``[positions / 16, rotary_size / 2, 2, 16]``: 16 positions of a pair are contiguous."""
    shape = (table.cos.shape[0], table.cos.shape[1])
    halves = torch.stack((fp32("rope.cos", table.cos, shape), fp32("rope.sin", table.sin, shape)), -1)
    padded = F.pad(halves, (0, 0, 0, 0, 0, -shape[0] % LANES))
    return padded.unflatten(0, (-1, LANES)).permute(0, 2, 3, 1).contiguous()


def set_rope(struct: Plan, rope: RotaryTable) -> torch.Tensor:
    """Let keys be turned; returns what the struct points to from now on.

    Raises:
        ValueError: more channels turn than a head has, or the table is not FP32 on the CPU.
    """
    if rope.rotary_size > struct.head_size:
        raise ValueError(f"RoPE of {rope.rotary_size} channels does not fit head_size = {struct.head_size}")
    table = tiled_table(rope)
    struct.rope = table.data_ptr()
    struct.rotary_size = rope.rotary_size
    struct.rotary_positions = rope.cos.shape[0]
    struct.rotary_interleaved = int(rope.interleaved)
    return table


@per_object
def prepare(plan: AttentionLayerPlan, with_integers: bool, with_tiles: bool) -> CpuPlan:
    """The plan for these kernels, made on first use and forgotten together with ``plan``."""
    return CpuPlan(plan, with_integers, with_tiles)
