"""How many kernels serving compiles beyond what start-up did, on a machine without a GPU.

``python -m tests.attention.gpu.variants`` calls the host functions for the batches with which an engine starts
(attention/start_up.py), then for those of a long day: 1 to 256 sequences, any number of drafted tokens, prompts of many
lengths, block tables of another width. Nothing is compiled: of every launch, what Triton would compile it for is noted,
also whether tensors start at a multiple of 16 bytes. Some cases have several layers, as a model has. It prints one line
of JSON per case. Must run without TRITON_INTERPRET.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction, MockTensor

from benchmarks.gpu import layers
from tests.attention.attention_cases import make_plan
from tests.attention.gpu import compile_cases
from tests.attention.gpu.compiled import GPUlessDriver
from tests.kivi.gpu import compile_cases as kivi_cases
from tests.kivi.kivi_cases import make_plan as make_kivi_plan
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu import launch
from xquant_vllm.attention.gpu.hot.buffers import BufferSizes, HotBuffers
from xquant_vllm.attention.gpu.hot.rows import HotRowTensors
from xquant_vllm.attention.gpu.hot.write import write_tokens
from xquant_vllm.attention.gpu.store.store import store
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.attention.start_up import Lengths, start_up_batches
from xquant_vllm.kivi.gpu.launch import paged_attention as kivi_attention
from xquant_vllm.kivi.gpu.store import store as kivi_store
from xquant_vllm.kivi.plan import KiviBatch

TOKENS, SEQUENCES, LENGTH, BLOCK = 2048, 256, 24576, 16
Step = Callable[[AttentionBatch, int], None]
"""Of a batch on the host, and of its query tokens."""


class _Placed(MockTensor):
    """A tensor without memory that says where the one in its place starts."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.dtype)
        self._start = 0 if tensor.device.type == "meta" else tensor.data_ptr()

    def data_ptr(self) -> int:
        return self._start


def _placed(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return _Placed(argument)
    if isinstance(argument, tuple):
        return type(argument)(*map(_placed, argument))
    return argument


@contextmanager
def noted_variants() -> Iterator[dict[str, set[str]]]:
    """Within it a launch adds what it would be compiled for to its kernel's."""
    triton.runtime.driver.set_active(GPUlessDriver(90))
    run, found = JITFunction.run, {}

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        *_, binder = self.device_caches[90]
        _, specialization, options = binder(*map(_placed, args), debug=False, **kwargs)
        found.setdefault(self.__name__, set()).add(f"{specialization} {sorted(map(str, options.items()))}")

    JITFunction.run = note
    try:
        yield found
    finally:
        JITFunction.run = run


def _batch(lengths: Lengths, decode_tokens: int, columns: int, device: torch.device) -> AttentionBatch:
    query_lens, seq_lens = zip(*lengths, strict=True)
    longest = max(query_lens)
    return AttentionBatch(
        torch.tensor([0, *query_lens]).cumsum(0).int().to(device),
        torch.tensor(seq_lens, dtype=torch.int32).to(device),
        torch.zeros(len(lengths), columns, dtype=torch.int32, device=device),
        longest,
        lengths if longest > decode_tokens else None,
        decode_tokens,
    )


def served_batches(decode_tokens: int) -> Iterator[Lengths]:
    """Of a long day."""
    for count in range(1, SEQUENCES + 1):
        yield ((1, 1000),) * count
    for count in (1, 2, 16, 31, 32, 255):
        for new in sorted({2, 3, 16, 17, decode_tokens}):
            if new <= decode_tokens and new * count <= TOKENS:
                yield ((new, 1000),) * count
    for prompt in (decode_tokens + 1, 32, 100, 256, 1025, 2048):
        for beside in (0, 1, 2, 16, 33):
            if prompt > decode_tokens and prompt + beside * decode_tokens <= TOKENS:
                yield (*((decode_tokens, 900),) * beside, (prompt, prompt + 5000 * beside))


def latents(spec: Any, decode_tokens: int) -> Step:
    """One layer."""
    return _layer(make_plan(spec), spec.dtype)


def calibrated(plans: Callable[[], list[AttentionLayerPlan]], decode_tokens: int) -> Step:
    """Several layers, whose channels have bits of their own, one after another."""
    steps = [_layer(plan, torch.bfloat16) for plan in plans()]

    def step(batch: AttentionBatch, tokens: int) -> None:
        for of_layer in steps:
            of_layer(batch, tokens)

    return step


def _layer(plan: AttentionLayerPlan, dtype: torch.dtype) -> Step:
    """A layer's store and attention, and what hot blocks add to it."""
    kv_heads, head_size = plan.projection.num_kv_heads, plan.projection.head_size
    pages = [torch.zeros(1, layout.page_bytes, dtype=torch.uint8) for layout in plan.layouts]
    rows = HotRowTensors(SEQUENCES, LENGTH // BLOCK, TOKENS, torch.device("cpu"))
    hot_of = torch.zeros(9, dtype=torch.int32)
    # The products in between are computed: few, and of X small ones.
    written = (1, 2, 3, 15, 16, 255, 256) if len(plan.layout.streams) > 1 else (1, 2, 3)
    buffers = HotBuffers(BufferSizes.of([plan]), TOKENS, dtype, plan.device)
    pool = [torch.zeros(1, BLOCK, kv_heads, head_size, dtype=dtype) for _ in range(2)]

    def step(batch: AttentionBatch, tokens: int) -> None:
        inputs = [torch.zeros(tokens, of.num_heads, of.width, dtype=dtype) for of in plan.layout.streams]
        slots = torch.zeros(tokens, dtype=torch.int64)
        store(pages, plan, slots, inputs)
        located = rows.locate(batch, slots, hot_of, BLOCK, None, None)
        if tokens in written:
            for before in (None, "layer"):
                write_tokens(pages, plan, located.written, buffers, *pool, layer="layer", before=before)
        query = torch.zeros(tokens, plan.num_heads, head_size, dtype=dtype)
        launch.paged_attention(query, pages, plan, batch, torch.empty_like(query), inputs)

    return step


def kivi(spec: Any, decode_tokens: int) -> Step:
    """A layer of KIVI."""
    plan, device = make_kivi_plan(spec), kivi_cases.META
    pages = kivi_cases._pages(plan)

    def step(batch: AttentionBatch, tokens: int) -> None:
        of_batch = KiviBatch(batch, torch.zeros_like(batch.block_table))
        slots = torch.empty(tokens, dtype=torch.int64, device=device)
        keys = torch.empty(tokens, spec.kv_heads, spec.head_size, dtype=spec.dtype, device=device)
        kivi_store(*pages, plan, of_batch, slots, slots, keys, keys)
        query = torch.empty(tokens, plan.num_heads, spec.head_size, dtype=spec.dtype, device=device)
        kivi_attention(query, *pages, plan, of_batch, torch.empty_like(query))

    return step


_SERVED = replace(compile_cases.SPECS["folded"], key_outliers=1)
_SMALL = layers.Model("small", 1024, 8, 2, 128)
_JOINT = replace(compile_cases.SPECS["chain"], kv_heads=2, hidden_size=1024)


def _of_model(*formats: str) -> list[AttentionLayerPlan]:
    """Layers whose runs differ as calibration has them; every third sees a window only."""
    plans = [
        layers.make_layer(_SMALL, form, LENGTH, BLOCK, torch.device("cpu"), seed)
        for seed, form in enumerate(formats * 3)
    ]
    return [replace(plan, sliding_window=100) if index % 3 == 2 else plan for index, plan in enumerate(plans)]


def _chain() -> list[AttentionLayerPlan]:
    """An anchor, and layers that add to it."""
    anchor = layers.make_layer(_SMALL, "joint allocated 4", LENGTH, BLOCK, torch.device("cpu"), 0)
    return [anchor, *(make_plan(replace(_JOINT, earlier=(4,) * before, seed=before)) for before in (1, 2, 3))]


# What is served, and query tokens of a decoding sequence at most.
CASES: dict[str, tuple[Callable[[Any, int], Step], Any, int]] = {
    "latents": (latents, _SERVED, 1),
    "latents, 5 drafted": (latents, _SERVED, 6),
    "latents, 40 drafted, exact prompts": (latents, replace(_SERVED, exact_from=42), 41),
    "X": (latents, replace(compile_cases.SPECS["x"], hidden_size=1024), 1),
    "chain of X": (latents, replace(compile_cases.SPECS["deltas"], hidden_size=1024), 1),
    "calibrated per head": (calibrated, partial(_of_model, "allocated 2", "allocated 4"), 1),
    "calibrated per head, 5 drafted": (calibrated, partial(_of_model, "allocated 3", "allocated 4"), 6),
    "calibrated joint": (calibrated, partial(_of_model, "joint allocated 4"), 1),
    "calibrated chain": (calibrated, _chain, 1),
    "KIVI": (kivi, kivi_cases.SPECS["KIVI 4"], 1),
    "KIVI, 5 drafted": (kivi, kivi_cases.SPECS["KIVI 4"], 6),
}


def variants(name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Of every kernel, what start-up compiles in one of ``CASES``, and what serving compiles beyond that."""
    make, spec, decode_tokens = CASES[name]
    device = kivi_cases.META if make is kivi else torch.device("cpu")
    step = make(spec, decode_tokens)
    with noted_variants() as started:
        # vLLM's block tables need not be as wide as those of start-up.
        for lengths in start_up_batches(decode_tokens, TOKENS, SEQUENCES, LENGTH):
            step(_batch(lengths, decode_tokens, max(of for _, of in lengths), device), sum(n for n, _ in lengths))
    with noted_variants() as served:
        for lengths in served_batches(decode_tokens):
            step(_batch(lengths, decode_tokens, LENGTH // BLOCK, device), sum(n for n, _ in lengths))
    later = {kernel: len(of - started.get(kernel, set())) for kernel, of in served.items()}
    return {kernel: len(of) for kernel, of in started.items()}, later


def main() -> None:
    for name in CASES:
        started, later = variants(name)
        line = {"case": name, "seconds": round(time.process_time(), 1), "started": started, "later": later}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
