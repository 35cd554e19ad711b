"""One shape: our kernels on all formats and the baselines, on the same device, in turns."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.baselines import BASELINES, Baseline
from benchmarks.gpu.checks import relative_errors, stored_numbers
from benchmarks.gpu.cost import Cost, Roofs, attention_cost, dense_attention_cost, floor, store_cost
from benchmarks.gpu.kernels import KERNELS, attend_whole_of
from benchmarks.gpu.layers import DECODE_TOKENS, Model, Shape, fill_pages, make_layer, page_bytes_of
from benchmarks.gpu.problem import Prepared, Problem
from benchmarks.gpu.timing import Calls, Timing, measure
from xquant_vllm.attention import reference
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.prefill.step import PrefillSteps
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.pages import load_slots

# Sets of inputs together are so many times as large as the L2 cache, so that it holds none of them; up to so many sets.
_CACHES, _MOST_SETS = 2.5, 256
# Of RoPE tables.
_POSITIONS = 65536 + 64
# Of free memory.
_MEMORY_SHARE = 0.8
# What cannot be faster than this, in seconds, is not timed: a kernel far from the floor would take all the time.
_LONGEST_CALL = 0.1
_SAMPLES, _SECONDS_PER_VARIANT = 9, 0.3
# Of outputs, in BF16.
_ALLOWED_ERROR = 2e-2

Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to time.

    Attributes:
        shape: the shape.
        formats: of the pages, out of ``layers.FORMATS``.
        kernels: names in ``KERNELS``.
        baselines: names of those in ``BASELINES`` that can be used here.
        roofs: of the device; None: not known, and nothing is said of shares.
        block_size: tokens of a page.
        layer_seed: of weights; one for all shapes, so that layers are made once.
        seed: of inputs.
        label: what the numbers are, if no measurements; None: they are.
    """

    shape: Shape
    formats: tuple[str, ...]
    kernels: tuple[str, ...]
    baselines: tuple[str, ...]
    roofs: Roofs | None
    block_size: int
    layer_seed: int
    seed: int
    label: str | None


def time_shape(request: Request) -> list[Row]:
    """Rows for the results: one for every format and kernel, and one for every baseline."""
    torch.manual_seed(request.seed)
    with torch.inference_mode():
        rows = _time_store(request) if request.shape.operation == "store" else _time_attention(request)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


def row_of(request: Request, variant: str, kind: str, **more: Any) -> Row:
    """A row without any result yet; ``kind`` is ``"xquant"``, ``"16-bit"`` and so on."""
    shape = request.shape
    row: Row = {
        "shape": shape.name,
        "model": shape.model.name,
        "operation": shape.operation,
        "batch": shape.batch,
        "context": shape.context,
        "query_len": shape.query_len,
        "variant": variant,
        "kind": kind,
    }
    return row | ({"label": request.label} if request.label else {}) | more


@functools.cache
def _layer(model: Model, name: str, block_size: int, device: torch.device, seed: int) -> AttentionLayerPlan:
    """Kept while the process lives: describing thousands of bands to the kernels takes seconds."""
    plan = make_layer(model, name, _POSITIONS, block_size, device, seed)
    return replace(plan, attend_whole=attend_whole_of(model, device, _operand_dtype()))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _operand_dtype() -> torch.dtype:
    """The interpreter multiplies the bit patterns of BF16 numbers: there it is FP32."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _free_memory() -> int:
    return int(_MEMORY_SHARE * torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 2**30


def _sets(smallest: int, longest: float) -> int:
    """How many sets of inputs; ``longest`` is the largest floor of a call."""
    if not torch.cuda.is_available():
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    wanted = math.ceil(_CACHES * cache / smallest)
    return max(1, min(wanted, _MOST_SETS, int(_LONGEST_CALL / max(longest, 1e-9))))


@dataclass(frozen=True)
class _Variant:
    """Something to time, and what its output of the first set is held against."""

    row: Row
    calls: Calls
    cost: Cost
    error: Any  # () -> float
    allowed: float


def _measured(request: Request, variants: Sequence[_Variant]) -> list[Row]:
    """Check, time in turns, and compare with the fastest 16-bit attention that is right."""
    rows, right = [], []
    for variant in variants:
        try:
            error = variant.error()
        except Exception as why:
            rows.append(variant.row | failure(why))
            continue
        row = variant.row | {"error": error, "status": "ok" if error <= variant.allowed else "wrong"}
        if row["status"] == "wrong":
            row["reason"] = f"error {error:.2g} is above {variant.allowed:.2g}"
        right.append(replace(variant, row=row))
    timings = measure(
        {variant.row["variant"]: variant.calls for variant in right},
        samples=_SAMPLES,
        seconds=_SECONDS_PER_VARIANT * len(right),
        # Prompts are described to the kernels by copies from the host, of which a graph would keep the addresses only.
        graphs=request.shape.operation != "prefill",
    )
    for variant in right:
        timing = timings[variant.row["variant"]]
        if isinstance(timing, Timing):
            rows.append(variant.row | figures(timing, variant.cost, request.roofs, len(variant.calls)))
        else:
            rows.append(variant.row | failure(timing))
    dense = [row for row in rows if row["kind"] == "16-bit" and row["status"] == "ok"]
    if dense and request.label is None:
        fastest = min(dense, key=lambda row: row["us"])
        for row in rows:
            if "us" in row:
                row |= {"speed_to_16_bit": fastest["us"] / row["us"], "compared_with": fastest["variant"]}
    return rows


def figures(timing: Timing, cost: Cost, roofs: Roofs | None, sets: int) -> Row:
    """What a timing says."""
    row: Row = {
        "us": timing.median * 1e6,
        "us_range": [timing.fastest * 1e6, timing.slowest * 1e6],
        "samples": timing.samples,
        "sets": sets,
        "method": timing.method,
        "bytes": cost.bytes,
        "flops": cost.flops,
    }
    if roofs is not None:
        least, roof = floor(cost, roofs)
        row |= {"roof": roof, "floor_us": least * 1e6, "share_of_roof": least / timing.median}
    return row


def failure(error: Exception) -> Row:
    """A row's part that says what went wrong."""
    if isinstance(error, NotImplementedError):
        return {"status": "skipped", "reason": str(error)}
    return {"status": "failed", "reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


# --- Attention ---


def _time_attention(request: Request) -> list[Row]:
    shape, model, device = request.shape, request.shape.model, _device()
    lengths, query_lens = [shape.seq_len] * shape.batch, [shape.query_len] * shape.batch
    padded = -(-shape.seq_len // request.block_size) * request.block_size
    dense_bytes = 4 * shape.batch * padded * model.kv_heads * model.head_size
    rows: list[Row] = []
    plans: dict[str, AttentionLayerPlan] = {}
    costs: dict[str, Cost] = {}
    longest = 0.0
    for name in request.formats:
        plan = _layer(model, name, request.block_size, device, request.layer_seed)
        cost = attention_cost(plan, lengths, query_lens, _operand_dtype().itemsize)
        least = 0.0 if request.roofs is None else floor(cost, request.roofs)[0]
        if least > _LONGEST_CALL:
            reason = f"a call takes at least {least:.2g} s, more than {_LONGEST_CALL} s"
            rows += _skipped(request, [name], reason)
            continue
        longest = max(longest, least)
        plans[name], costs[name] = plan, cost
    if not plans:
        return rows
    memory = _free_memory()
    page_bytes = {name: page_bytes_of(plan, lengths) for name, plan in plans.items()}
    sets = _sets(min(page_bytes.values()), longest)
    usable: list[Baseline] = []
    more_bytes = 0.0
    for baseline in BASELINES:
        if baseline.name in request.baselines:
            usable.append(baseline)
            more_bytes += dense_bytes * (baseline.number_bytes / 2 if baseline.bits < 16 else 0)
    # Everything at once, or the formats one by one, or without baselines.
    groups: list[tuple[list[str], list[Baseline]]] = [(list(plans), usable)]
    whole = dense_bytes + more_bytes + sum(page_bytes.values())
    reason = f"of {memory / 2**30:.0f} GiB of memory keys and values take {dense_bytes / 2**30:.0f} GiB"
    if whole > memory:
        large = [baseline for baseline in usable if baseline.bits < 16]
        if dense_bytes + max(page_bytes.values()) > memory:
            large = usable
        rows += [_of_baseline(request, baseline) | {"status": "skipped", "reason": reason} for baseline in large]
        kept = [baseline for baseline in usable if baseline not in large]
        groups = [([name], kept) for name in plans if page_bytes[name] <= memory]
        rows += _skipped(request, [name for name in plans if page_bytes[name] > memory], reason)
    sets = max(1, min(sets, int(memory // whole)))
    for names, baselines in groups:
        rows += _attention_group(request, {name: (plans[name], costs[name]) for name in names}, baselines, sets)
    return rows


def _skipped(request: Request, formats: Sequence[str], reason: str) -> list[Row]:
    return [
        row_of(request, _variant_name(name, kernels), "xquant", status="skipped", reason=reason)
        for name in formats
        for kernels in request.kernels
    ]


def _variant_name(name: str, kernels: str) -> str:
    return f"{name} ({kernels})"


def _of_baseline(request: Request, baseline: Baseline) -> Row:
    return row_of(request, baseline.name, baseline.kind)


def _attention_group(
    request: Request,
    layers: Mapping[str, tuple[AttentionLayerPlan, Cost]],
    baselines: Sequence[Baseline],
    sets: int,
) -> list[Row]:
    shape, model, device, dtype = request.shape, request.shape.model, _device(), _operand_dtype()
    generator = torch.Generator(device).manual_seed(request.seed)
    queries = torch.randn(
        sets, shape.batch, shape.query_len, model.heads, model.head_size,
        device=device, generator=generator, dtype=dtype,
    )  # fmt: skip
    rows: list[Row] = []
    variants: list[_Variant] = []
    for name, (plan, cost) in layers.items():
        for kernels in request.kernels:
            row = row_of(request, _variant_name(name, kernels), "xquant", format=name)
            row["bytes_per_token"] = sum(layout.bytes_per_token for layout in plan.layouts)
            attention = KERNELS[kernels]().paged_attention
            if attention is None:
                rows.append(row | {"status": "missing", "reason": "no attention kernel"})
                continue
            variants.append(_ours(request, plan, cost, row, attention, queries))
    if baselines:
        padded = -(-shape.seq_len // request.block_size) * request.block_size
        keys, values = (
            torch.randn(
                sets, shape.batch, padded, model.kv_heads, model.head_size,
                device=device, generator=generator, dtype=dtype,
            )
            for _ in range(2)
        )  # fmt: skip
        problem = Problem(queries, keys, values, shape.seq_len, request.block_size)
        lengths, query_lens = [shape.seq_len] * shape.batch, [shape.query_len] * shape.batch
        for baseline in baselines:
            try:
                prepared = baseline.prepare(problem)
            except Exception as error:
                rows.append(_of_baseline(request, baseline) | failure(error))
                continue
            cost = dense_attention_cost(
                model.heads, model.kv_heads, model.head_size, lengths, query_lens,
                (prepared.number_bytes or baseline.number_bytes) * dtype.itemsize / 2, dtype.itemsize,
            )  # fmt: skip
            row = _of_baseline(request, baseline)
            variants.append(_Variant(row, prepared.calls, cost, _error_of(prepared, problem), prepared.allowed))
    return rows + _measured(request, variants)


def _error_of(prepared: Prepared, problem: Problem) -> Any:
    def error() -> float:
        batch, query_len, heads, size = problem.queries.shape[1:]
        output = prepared.calls[0]().reshape(batch, query_len, heads, size)
        return relative_errors(output[0], prepared.expected())[0]

    return error


def _ours(
    request: Request, plan: AttentionLayerPlan, cost: Cost, row: Row, attention: Any, queries: torch.Tensor
) -> _Variant:
    shape, device = request.shape, queries.device
    sets, batch = queries.shape[:2]
    blocks = -(-shape.seq_len // request.block_size)
    pages = fill_pages(plan, sets * batch * blocks, request.seed)
    generator = torch.Generator().manual_seed(request.seed)
    tables = torch.randperm(sets * batch * blocks, generator=generator).int().view(sets, batch, blocks).to(device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * shape.query_len
    lengths = torch.full((batch,), shape.seq_len, dtype=torch.int32, device=device)
    flat = queries.flatten(1, 2)
    outputs = torch.full_like(flat, torch.nan)
    # As the kernels are told: not where all sequences decode.
    on_host = ((shape.query_len, shape.seq_len),) * batch if shape.query_len > DECODE_TOKENS else None
    batches = [AttentionBatch(starts, lengths, table, shape.query_len, on_host, DECODE_TOKENS) for table in tables]
    # Made once per step, not per layer, so it is not timed.
    step = PrefillSteps([plan]).make(batches[0])
    batches = [replace(of, prefill=step) for of in batches]

    def call(index: int) -> None:
        attention(flat[index], pages, plan, batches[index], outputs[index])

    def error() -> float:
        """Of the first and the last sequence."""
        outputs.fill_(torch.nan)
        call(0)
        worst = 0.0
        for sequence in {0, batch - 1}:
            tokens = slice(sequence * shape.query_len, (sequence + 1) * shape.query_len)
            alone = AttentionBatch(starts[:2], lengths[:1], tables[0, sequence : sequence + 1], shape.query_len)
            expected = torch.empty_like(flat[0, tokens], dtype=torch.float32)
            reference.paged_attention(flat[0, tokens].float(), pages, plan, alone, expected)
            worst = max(worst, relative_errors(outputs[0, tokens], expected)[0])
        return worst

    calls = [lambda index=index: call(index) for index in range(sets)]
    return _Variant(row, calls, cost, error, _ALLOWED_ERROR)


# --- Store ---


def _time_store(request: Request) -> list[Row]:
    rows: list[Row] = []
    for name in request.formats:
        variants = []
        for kernels in request.kernels:
            row = row_of(request, _variant_name(name, kernels), "xquant", format=name)
            store = KERNELS[kernels]().store
            if store is None:
                rows.append(row | {"status": "missing", "reason": "no store kernel"})
            else:
                variants.append(_stored(request, name, row, store))
        if variants:
            rows += _measured(request, [*variants, _copy(request, name, variants[0].cost, len(variants[0].calls))])
    return rows


def _stored(request: Request, name: str, row: Row, store: Any) -> _Variant:
    shape, device, dtype = request.shape, _device(), _operand_dtype()
    tokens, block_size = shape.batch, request.block_size
    plan = _layer(shape.model, name, block_size, device, request.layer_seed)
    cost = store_cost(plan, tokens, dtype.itemsize)
    sets = min(64, _sets(cost.bytes, 0.0))
    # Few tokens are those of as many sequences that decode, each in a block of its own; many are of a prompt.
    scattered = tokens < 1024
    blocks = tokens if scattered else -(-tokens // block_size)
    pages = fill_pages(plan, sets * blocks, request.seed)
    generator = torch.Generator().manual_seed(request.seed)
    order = torch.randperm(sets * blocks, generator=generator).view(sets, blocks, 1) * block_size
    within = torch.randint(block_size, (1, blocks, 1), generator=generator) if scattered else torch.arange(block_size)
    slots = (order + within).flatten(1)[:, :tokens].contiguous().to(device)
    of_device = torch.Generator(device).manual_seed(request.seed)
    inputs = [
        tuple(
            torch.randn(tokens, s.num_heads * s.width, device=device, generator=of_device, dtype=dtype)
            for s in plan.layout.streams
        )
        for _ in range(sets)
    ]

    def call(index: int) -> None:
        store(pages, plan, slots[index], inputs[index])

    def error() -> float:
        """By how much what reads back is worse than with the reference, of the first few tokens."""
        some = slots[0][:256]
        pages[0][some // block_size] = 0xFF
        call(0)
        exact = stored_numbers(plan, pages, some, tuple(x[:256] for x in inputs[0]))
        expected = (pages[0].clone(), *pages[1:])
        reference.store(expected, plan, some, tuple(x[:256] for x in inputs[0]))
        worst = 0.0
        for index, x in enumerate(exact):
            by_kernel, by_reference = (
                float((load_slots(of[0], plan.layout, some, index).flatten(1) - x).double().square().sum())
                for of in (pages, expected)
            )
            worst = max(worst, by_kernel / by_reference - 1 if by_kernel < math.inf else math.inf)
        return worst

    calls = [lambda index=index: call(index) for index in range(sets)]
    return _Variant(row | {"bytes_per_token": plan.layout.bytes_per_token}, calls, cost, error, _ALLOWED_ERROR)


def _copy(request: Request, name: str, cost: Cost, sets: int) -> _Variant:
    """A copy that moves as many bytes: what a store of this size could reach."""
    device, half = _device(), max(1, cost.bytes // 2)
    source = torch.randint(256, (sets, half), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = [lambda index=index: target[index].copy_(source[index]) for index in range(sets)]
    row = row_of(request, f"copy of as many bytes as {name}", "copy")
    return _Variant(row, calls, Cost(2 * half, 0), lambda: 0.0, 0.0)
