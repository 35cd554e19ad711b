"""The C++ kernels of csrc/cpu: :mod:`xquant_vllm.attention.reference`, fast, on CPUs.

What is guaranteed, for one instruction set:

* ``store`` writes the bytes that the reference writes (a NaN or a zero may differ in its sign);
* ``paged_attention`` agrees with the reference in FP32 to a relative error of about 1e-5;
* the output of a query token has the same bits whatever else is in the batch, however its prompt was cut into chunks,
  wherever its blocks lie and however many threads work: the context is reduced in chunks at fixed positions.

The library is plain C (csrc/cpu/api.h) and called through ctypes. It is linked against no OpenMP runtime, so that it
runs on the threads of the runtime that torch uses; see :func:`_share_openmp_runtime`.
"""

import ctypes
import os
import re
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F

from xquant_vllm.attention.batch import AttentionBatch, AttentionLayerPlan
from xquant_vllm.codec.layout import StreamFormat, StreamOffsets
from xquant_vllm.projection.rope import RotaryTable

LIBRARY_PATH = Path(__file__).with_name("_cpu_kernels.so")

_ABI = 1
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Rows of the value up-projection are padded, and the rotary table is cut, to this (kPad and kRun in csrc/cpu).
_LANES = 16

_int64, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Stream(ctypes.Structure):
    """``xquant_stream``."""

    _fields_ = [
        (name, _int64)
        for name in (
            "num_heads",
            "width",
            "bits",
            "group_size",
            "outlier_channels",
            "codes",
            "scales",
            "zeros",
            "outliers",
        )
    ]


class _Plan(ctypes.Structure):
    """``xquant_plan``."""

    _fields_ = [
        ("key", _Stream),
        ("value", _Stream),
        ("block_size", _int64),
        ("page_bytes", _int64),
        ("num_heads", _int64),
        ("num_kv_heads", _int64),
        ("head_size", _int64),
        ("up_key", _pointer),
        ("up_value", _pointer),
        ("key_bias", _pointer),
        ("value_bias", _pointer),
        ("key_norm", _pointer),
        ("rope", _pointer),
        ("rotary_size", _int64),
        ("rotary_positions", _int64),
        ("rotary_interleaved", _int64),
        ("sliding_window", _int64),
        ("key_norm_eps", _float),
        ("scale", _float),
        ("soft_cap", _float),
    ]


class _StoreCall(ctypes.Structure):
    """``xquant_store_call``."""

    _fields_ = [
        ("pages", _pointer),
        ("pages_stride", _int64),
        ("num_blocks", _int64),
        ("slot_mapping", _pointer),
        ("num_tokens", _int64),
        ("key", _pointer),
        ("key_stride", _int64),
        ("key_dtype", _int64),
        ("value", _pointer),
        ("value_stride", _int64),
        ("value_dtype", _int64),
    ]


class _AttentionCall(ctypes.Structure):
    """``xquant_attention_call``."""

    _fields_ = [
        ("pages", _pointer),
        ("pages_stride", _int64),
        ("num_blocks", _int64),
        ("query", _pointer),
        ("query_token_stride", _int64),
        ("query_head_stride", _int64),
        ("output", _pointer),
        ("output_token_stride", _int64),
        ("output_head_stride", _int64),
        ("dtype", _int64),
        ("num_tokens", _int64),
        ("query_start_loc", _pointer),
        ("seq_lens", _pointer),
        ("block_table", _pointer),
        ("block_table_stride", _int64),
        ("max_blocks", _int64),
        ("num_seqs", _int64),
    ]


def _mapped_openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process, in the order of their addresses."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line)
    return list(dict.fromkeys(path for path in paths if re.match(r"lib(gomp|iomp5|omp)\b", os.path.basename(path))))


def _share_openmp_runtime() -> None:
    """Make the OpenMP symbols of torch's runtime visible to the library that is loaded next.

    A second runtime would bring a second set of threads, which fight the first one for the cores and know nothing of
    ``torch.set_num_threads``. LLVM's and Intel's runtimes answer to GNU's symbols, too.
    """
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):  # preloaded (LD_PRELOAD): torch uses that one, too
        return
    runtimes = _mapped_openmp_runtimes()
    # Several are mapped if another package brought its own: torch's is the one in torch's folder.
    torch_folder = os.path.dirname(torch.__file__)
    runtimes.sort(key=lambda path: not path.startswith(torch_folder))
    ctypes.CDLL(runtimes[0] if runtimes else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def _load() -> ctypes.CDLL:
    """Load the library.

    Raises:
        OSError: it was not built, does not fit this machine, or is of another version.
    """
    if not LIBRARY_PATH.is_file():
        raise OSError(f"{LIBRARY_PATH} was not built")
    _share_openmp_runtime()
    library = ctypes.CDLL(str(LIBRARY_PATH))
    if library.xquant_cpu_abi() != _ABI:
        raise OSError(f"{LIBRARY_PATH} is of another version of this package")
    for function in (library.xquant_cpu_store, library.xquant_cpu_attention, library.xquant_cpu_isa):
        function.restype = ctypes.c_char_p
    library.xquant_cpu_set_isa.argtypes = [ctypes.c_char_p]
    return library


_library = _load()


def isa() -> str:
    """The instruction set in use: ``avx512``, ``avx2`` or ``portable``."""
    return str(_library.xquant_cpu_isa().decode())


def set_isa(name: str | None) -> bool:
    """Use another instruction set, or the best one for None; False where this machine or this build lacks it."""
    return bool(_library.xquant_cpu_set_isa(None if name is None else name.encode()))


def num_threads() -> int:
    """Threads that the next call would use."""
    return int(_library.xquant_cpu_threads())


class _Prepared:
    """A plan as the kernels want it: the C struct and the tensors that it points to."""

    def __init__(self, plan: AttentionLayerPlan) -> None:
        """Check the plan and rearrange what the kernels read in another order."""
        layout, projection = plan.layout, plan.projection
        kv_heads, head_size = projection.num_kv_heads, projection.head_size
        if len(layout.streams) != 2:
            raise ValueError(f"a page must hold key and value latents, not {len(layout.streams)} streams")
        key, value = layout.streams
        if head_size % 8:
            raise ValueError(f"head_size = {head_size} is not supported: it must be a multiple of 8")
        if kv_heads <= 0 or plan.num_heads % kv_heads:
            raise ValueError(f"num_heads = {plan.num_heads} is not a multiple of the {kv_heads} kv heads")
        for name, stream in (("key", key), ("value", value)):
            if stream.num_heads not in (1, kv_heads):
                raise ValueError(f"{stream.num_heads} {name} latent heads do not fit {kv_heads} kv heads")
        norm, rope = projection.key_norm, projection.rope

        self._tensors: list[torch.Tensor] = []
        up_value = _fp32("up_value", projection.up_value, (kv_heads, value.width, head_size))
        struct = _Plan(
            key=_stream(key, layout.offsets[0]),
            value=_stream(value, layout.offsets[1]),
            block_size=layout.block_size,
            page_bytes=layout.page_bytes,
            num_heads=plan.num_heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            up_key=self._keep(_fp32("up_key", projection.up_key, (kv_heads, key.width, head_size))),
            up_value=self._keep(F.pad(up_value, (0, -head_size % _LANES)) if head_size % _LANES else up_value),
            scale=plan.scale,
            sliding_window=plan.sliding_window or 0,
            soft_cap=plan.logits_soft_cap or 0.0,
        )
        if projection.key_bias is not None:
            struct.key_bias = self._keep(_fp32("key_bias", projection.key_bias, (kv_heads, head_size)))
        if projection.value_bias is not None:
            struct.value_bias = self._keep(_fp32("value_bias", projection.value_bias, (kv_heads, head_size)))
        if norm is not None:
            struct.key_norm = self._keep(_fp32("key_norm.weight", norm.weight, (head_size,)))
            struct.key_norm_eps = norm.eps
        if rope is not None and rope.rotary_size:
            if rope.rotary_size > head_size:
                raise ValueError(f"RoPE of {rope.rotary_size} channels does not fit head_size = {head_size}")
            struct.rope = self._keep(_tiled_table(rope))
            struct.rotary_size = rope.rotary_size
            struct.rotary_positions = rope.cos.shape[0]
            struct.rotary_interleaved = int(rope.interleaved)
        self.struct = struct
        self.pointer = ctypes.byref(struct)
        self.page_bytes = layout.page_bytes
        self.key_elements = key.num_heads * key.width
        self.value_elements = value.num_heads * value.width
        self.heads = (plan.num_heads, head_size)

    def _keep(self, tensor: torch.Tensor) -> int:
        self._tensors.append(tensor)
        return tensor.data_ptr()


def _stream(stream: StreamFormat, at: StreamOffsets) -> _Stream:
    return _Stream(
        stream.num_heads,
        stream.width,
        stream.bits,
        stream.group_size,
        stream.outlier_channels,
        at.codes,
        at.scales,
        at.zeros,
        at.outliers,
    )


def _fp32(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be FP32 {list(shape)} on the CPU, not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    return tensor.contiguous()


# Layers share a rotary table, so its rearranged copy is shared as well. Keys are ids of live objects.
_tiled_tables: dict[int, torch.Tensor] = {}
_prepared: dict[int, _Prepared] = {}


def _tiled_table(table: RotaryTable) -> torch.Tensor:
    """Cosines and sines as ``[positions / 16, rotary_size / 2, 2, 16]``: 16 positions of a pair are contiguous."""
    tiled = _tiled_tables.get(id(table))
    if tiled is None:
        shape = (table.cos.shape[0], table.cos.shape[1])
        halves = torch.stack((_fp32("rope.cos", table.cos, shape), _fp32("rope.sin", table.sin, shape)), -1)
        padded = F.pad(halves, (0, 0, 0, 0, 0, -shape[0] % _LANES))
        tiled = padded.unflatten(0, (-1, _LANES)).permute(0, 2, 3, 1).contiguous()
        _tiled_tables[id(table)] = tiled
        weakref.finalize(table, _tiled_tables.pop, id(table), None)
    return tiled


def _prepare(plan: AttentionLayerPlan) -> _Prepared:
    prepared = _prepared.get(id(plan))
    if prepared is None:
        prepared = _prepared[id(plan)] = _Prepared(plan)
        weakref.finalize(plan, _prepared.pop, id(plan), None)
    return prepared


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_pages(pages: torch.Tensor, page_bytes: int) -> None:
    if (
        pages.dtype != torch.uint8
        or pages.device.type != "cpu"
        or pages.ndim != 2
        or pages.shape[1] != page_bytes
        or pages.stride(1) != 1
    ):
        raise ValueError(
            f"pages must be uint8 [num_blocks, {page_bytes}] on the CPU with contiguous rows, not {pages.dtype} "
            f"{list(pages.shape)} on {pages.device} with strides {pages.stride()}"
        )


def _dtype(name: str, tensor: torch.Tensor) -> int:
    code = _DTYPES.get(tensor.dtype)
    if code is None or tensor.device.type != "cpu":
        raise ValueError(f"{name} must be FP32, FP16 or BF16 on the CPU, not {tensor.dtype} on {tensor.device}")
    return code


def _index(name: str, tensor: torch.Tensor, dtype: torch.dtype, ndim: int) -> int:
    """Check a tensor of indices with contiguous rows; returns its address."""
    if (
        tensor.dtype != dtype
        or tensor.device.type != "cpu"
        or tensor.ndim != ndim
        or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1)
    ):
        raise ValueError(
            f"{name} must be {dtype} with {ndim} dimension(s) on the CPU and contiguous rows, not {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def _rows(name: str, tensor: torch.Tensor, elements: int) -> int:
    """Check latents ``[num_tokens, ...]`` whose tokens are contiguous; returns the stride of the tokens."""
    if tensor.ndim == 2 and tensor.shape[1] == elements and tensor.stride(1) == 1:
        return tensor.stride(0)
    count = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        _require(size <= 1 or stride == count, f"the {name} latents of a token must be contiguous")
        count *= size
    if tensor.ndim < 2 or count != elements:
        raise ValueError(f"{name} must hold {elements} latents per token, not {list(tensor.shape)}")
    return tensor.stride(0)


def _raise(message: bytes | None) -> None:
    if message is not None:
        raise ValueError(message.decode())


def store(
    pages: torch.Tensor, plan: AttentionLayerPlan, slot_mapping: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Quantize new latents into their slots; see :func:`xquant_vllm.attention.reference.store`.

    Tokens of ``key`` and ``value`` may lie at any stride.

    Raises:
        ValueError: a tensor has the wrong type, shape or strides, or a slot is out of range.
    """
    prepared = _prepare(plan)
    _check_pages(pages, prepared.page_bytes)
    num_tokens = key.shape[0]
    slots = _index("slot_mapping", slot_mapping, torch.int64, 1)
    if value.shape[0] != num_tokens or slot_mapping.shape[0] < num_tokens:
        raise ValueError(
            f"{num_tokens} keys, {value.shape[0]} values and {slot_mapping.shape[0]} slots do not fit together"
        )
    call = _StoreCall(
        pages.data_ptr(),
        pages.stride(0),
        pages.shape[0],
        slots,
        num_tokens,
        key.data_ptr(),
        _rows("key", key, prepared.key_elements),
        _dtype("key", key),
        value.data_ptr(),
        _rows("value", value, prepared.value_elements),
        _dtype("value", value),
    )
    _raise(_library.xquant_cpu_store(prepared.pointer, ctypes.byref(call)))


def paged_attention(
    query: torch.Tensor, pages: torch.Tensor, plan: AttentionLayerPlan, batch: AttentionBatch, output: torch.Tensor
) -> None:
    """Causal attention over pages; see :func:`xquant_vllm.attention.reference.paged_attention`.

    ``query`` and ``output`` may have any strides between tokens and heads.

    Raises:
        ValueError: a tensor has the wrong type, shape or strides, or the batch names tokens or blocks out of range.
    """
    prepared = _prepare(plan)
    _check_pages(pages, prepared.page_bytes)
    for name, tensor in (("query", query), ("output", output)):
        if tensor.ndim != 3 or tensor.shape[1:] != prepared.heads or tensor.stride(2) != 1:
            raise ValueError(
                f"{name} must be [num_tokens, {prepared.heads[0]}, {prepared.heads[1]}] with contiguous heads, not "
                f"{list(tensor.shape)} with strides {tensor.stride()}"
            )
    dtype = _dtype("query", query)
    if _dtype("output", output) != dtype or output.shape[0] != query.shape[0]:
        raise ValueError(
            f"output must be like query, {query.dtype} {list(query.shape)}, not {output.dtype} {list(output.shape)}"
        )
    table = batch.block_table
    num_seqs = batch.seq_lens.shape[0]
    starts = _index("query_start_loc", batch.query_start_loc, torch.int32, 1)
    lengths = _index("seq_lens", batch.seq_lens, torch.int32, 1)
    blocks = _index("block_table", table, torch.int32, 2)
    if batch.query_start_loc.shape[0] != num_seqs + 1 or table.shape[0] < num_seqs:
        raise ValueError(
            f"{num_seqs} seq_lens, {batch.query_start_loc.shape[0]} query_start_loc and {table.shape[0]} rows of "
            "block_table do not fit together"
        )
    call = _AttentionCall(
        pages.data_ptr(),
        pages.stride(0),
        pages.shape[0],
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        output.data_ptr(),
        output.stride(0),
        output.stride(1),
        dtype,
        query.shape[0],
        starts,
        lengths,
        blocks,
        table.stride(0),
        table.shape[1],
        num_seqs,
    )
    _raise(_library.xquant_cpu_attention(prepared.pointer, ctypes.byref(call)))
