"""Attention over keys and values by others: what a GPU user would run instead.

None of them is a dependency. What cannot be imported or used is named together with the error; what computes something
else than attention over the keys and values it was given is found by :func:`benchmarks.gpu.checks.relative_errors` on
the timed inputs and counts for nothing.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import kivi
from benchmarks.gpu.problem import Call, Prepared, Problem, causal_mask, exact_attention


@dataclass(frozen=True)
class Baseline:
    """One way to compute attention.

    Attributes:
        name: what tables call it.
        bits: of a cached number; 16 is what others are compared with.
        number_bytes: of a cached number, scales included.
        needs: imports what it needs; raises where it cannot be used here.
        prepare: its calls for a problem; raises where it does not offer this.
        own: whether it is of this repository: it may be slow, but not wrong.
    """

    name: str
    bits: int
    number_bytes: float
    needs: Callable[[], Any]
    prepare: Callable[[Problem], Prepared]
    own: bool = False

    @property
    def kind(self) -> str:
        """Of its rows in the results."""
        return "kivi" if self.own else f"{self.bits}-bit"

    def unavailable(self) -> str | None:
        """Why it cannot be used here; None where it can."""
        try:
            self.needs()
        except Exception as error:  # whatever an import of another package may raise
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return None


def _as_given(problem: Problem, calls: list[Call]) -> Prepared:
    keys, values = (x[0, 0, : problem.seq_len] for x in (problem.keys, problem.values))
    return Prepared(calls, _expected(problem, keys, values))


def _expected(problem: Problem, keys: torch.Tensor, values: torch.Tensor) -> Call:
    """Of attention over these keys and values of the first sequence, ``[seq_len, kv_heads, head_size]``."""
    return lambda: exact_attention(problem.queries[0, 0].float(), keys.float(), values.float())


def _gpu(package: str | None = None) -> None:
    """Refuse where there is no such package or no GPU."""
    if package is not None and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named '{package}'")
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU")


# --- torch ---


def _sdpa(backend: SDPBackend, problem: Problem) -> Prepared:
    query_len, seq_len = problem.query_len, problem.seq_len
    mask = None
    if not problem.queries.is_cuda:
        mask = causal_mask(query_len, seq_len, problem.queries.device)
    lower_right = mask is None and 1 < query_len < seq_len
    if lower_right and backend != SDPBackend.FLASH_ATTENTION:
        raise NotImplementedError("this backend has no causal mask for fewer queries than keys")

    def sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if lower_right:
            # What torch.nn.attention.bias.causal_lower_right calls; its causal mask ends at the last key.
            return torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, True)[0].transpose(1, 2)
        with sdpa_kernel(backend if mask is None else SDPBackend.MATH):
            causal = mask is None and query_len > 1
            return F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True
            ).transpose(1, 2)

    return _as_given(
        problem,
        [
            functools.partial(
                sdpa, query.transpose(1, 2), keys[:, :seq_len].transpose(1, 2), values[:, :seq_len].transpose(1, 2)
            )
            for query, keys, values in zip(problem.queries, problem.keys, problem.values, strict=True)
        ],
    )


# --- vLLM ---


def _vllm_flash_attention() -> Any:
    _gpu("vllm")
    from vllm import vllm_flash_attn

    return vllm_flash_attn


def _vllm_version(package: Any) -> int:
    return 3 if package.is_fa_version_supported(3) else 2


def _vllm_fp8() -> Any:
    package = _vllm_flash_attention()
    if _vllm_version(package) < 3:
        raise RuntimeError("FP8 needs FlashAttention 3, which is not supported on this device")
    return package


def _vllm(bits: int, problem: Problem) -> Prepared:
    package = _vllm_flash_attention()
    sets, batch, query_len, heads, size = problem.queries.shape
    device, kv_heads = problem.queries.device, problem.keys.shape[3]
    numbers = problem
    more: dict[str, Any] = {}
    if bits == 8:
        kind = torch.float8_e4m3fn
        numbers = Problem(
            problem.queries.to(kind),
            problem.keys.to(kind),
            problem.values.to(kind),
            problem.seq_len,
            problem.block_size,
        )
        ones = torch.ones(batch, kv_heads, device=device)
        more = {"q_descale": ones, "k_descale": ones, "v_descale": ones}
    blocks = problem.keys.shape[2] // problem.block_size
    table = torch.arange(batch * blocks, dtype=torch.int32, device=device).view(batch, blocks)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * query_len
    lengths = torch.full((batch,), problem.seq_len, dtype=torch.int32, device=device)

    def flash(index: int) -> torch.Tensor:
        return package.flash_attn_varlen_func(
            q=numbers.queries[index].view(batch * query_len, heads, size),
            k=numbers.keys[index].view(-1, problem.block_size, kv_heads, size),
            v=numbers.values[index].view(-1, problem.block_size, kv_heads, size),
            cu_seqlens_q=starts,
            max_seqlen_q=query_len,
            seqused_k=lengths,
            max_seqlen_k=problem.seq_len,
            softmax_scale=size**-0.5,
            causal=True,
            block_table=table,
            fa_version=_vllm_version(package),
            **more,
        )

    prepared = _as_given(numbers, [functools.partial(flash, index) for index in range(sets)])
    return replace(prepared, allowed=6e-2) if bits == 8 else prepared  # weights are rounded to FP8, too


# --- xformers ---


def _xformers() -> Any:
    _gpu("xformers")
    import xformers.ops

    return xformers.ops


def _xformers_split() -> Any:
    operators = _xformers()
    from xformers.ops.fmha import triton_splitk

    return operators, triton_splitk.FwOp


def _xformers_calls(problem: Problem, keys: torch.Tensor, values: torch.Tensor, operator: Any) -> list[Call]:
    """Calls on ``[sets, batch, padded seq_len, kv_heads, numbers]``, query heads in groups over one kv head."""
    operators = _xformers()
    sets, batch, query_len, heads, size = problem.queries.shape
    kv_heads, padded = keys.shape[3], keys.shape[2]
    group = heads // kv_heads
    bias = operators.fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[query_len] * batch, kv_padding=padded, kv_seqlen=[problem.seq_len] * batch
    )

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, batch * padded, kv_heads, 1, -1).expand(-1, -1, -1, group, -1)

    return [
        functools.partial(
            operators.memory_efficient_attention_forward,
            problem.queries[index].view(1, batch * query_len, kv_heads, group, size),
            wide(keys[index]),
            wide(values[index]),
            attn_bias=bias,
            op=operator,
        )
        for index in range(sets)
    ]


def _xformers_16(problem: Problem) -> Prepared:
    return _as_given(problem, _xformers_calls(problem, problem.keys, problem.values, None))


def _xformers_4(problem: Problem) -> Prepared:
    _, operator = _xformers_split()
    (keys, first_keys), (values, first_values) = (_int4(x, problem.seq_len) for x in (problem.keys, problem.values))
    calls = _xformers_calls(problem, keys, values, operator)
    return Prepared(calls, _expected(problem, first_keys, first_values))


def _int4(x: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as xformers' Triton kernel wants them, int32: scale and least number in FP16, then codes of 4 bits.

    Returns:
        The rows, and what the first sequence's mean, FP32.
    """
    packed = torch.empty(*x.shape[:-1], 1 + x.shape[-1] // 8, dtype=torch.int32, device=x.device)
    first = torch.empty(0)
    for index in range(x.shape[0]):
        for sequence in range(x.shape[1]):
            rows = x[index, sequence].float()
            least, most = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
            scale, least = ((most - least) / 15).half(), least.half()
            codes = ((rows - least.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
            pairs = codes[..., ::2] | codes[..., 1::2] << 4
            row = torch.cat((scale.view(torch.uint8), least.view(torch.uint8), pairs), -1)
            packed[index, sequence] = row.contiguous().view(torch.int32)
            if index == sequence == 0:
                first = (codes.float() * scale.float() + least.float())[:seq_len]
    return packed, first


BASELINES = (
    Baseline("SDPA flash", 16, 2, lambda: None, functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
    Baseline("SDPA cuDNN", 16, 2, _gpu, functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    Baseline("vLLM flash attention, paged", 16, 2, _vllm_flash_attention, functools.partial(_vllm, 16)),
    Baseline("xformers", 16, 2, _xformers, _xformers_16),
    Baseline("vLLM flash attention, paged, FP8", 8, 1, _vllm_fp8, functools.partial(_vllm, 8)),
    Baseline("xformers split-K, int4", 4, 0.5 + 4 / 128, _xformers_split, _xformers_4),
    *(
        Baseline(
            f"KIVI, {bits} bits",
            bits,
            bits / 8 + 4 / kivi.GROUP,
            kivi.needs,
            functools.partial(kivi.prepare, bits),
            own=True,
        )
        for bits in (4, 2)
    ),
)
