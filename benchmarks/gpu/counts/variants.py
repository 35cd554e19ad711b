"""How many variants of kernels are compiled while serving: nothing is compiled here, only what Triton tells apart."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from benchmarks.gpu.cases import make_plan
from benchmarks.gpu.counts.rows import attend, served_spec
from tests.attention.gpu.compiled import GPUlessDriver, _mocked
from xquant_vllm.attention.gpu.store.store import store

BATCHES = range(1, 257)
"""Numbers of decoding sequences that are served."""


@contextmanager
def specializations(capability: int = 90) -> Iterator[dict[str, set[str]]]:
    """Within it launches do nothing; for every kernel, which variants of it they would need."""
    triton.runtime.driver.set_active(GPUlessDriver(capability))
    run, found = JITFunction.run, defaultdict(set)

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = self.device_caches[capability][-1]
        _, specialization, options = binder(*map(_mocked, args), debug=False, **kwargs)
        found[self.__name__].add(f"{specialization} {sorted(options.items(), key=str)}")

    JITFunction.run = note
    try:
        yield found
    finally:
        JITFunction.run = run


def new_variants(start_up: Callable[[], None], serve: Callable[[], None]) -> dict[str, int]:
    """For every kernel, variants that ``serve`` needs and that ``start_up`` did not compile."""
    with specializations() as found:
        start_up()
        before = {name: set(variants) for name, variants in found.items()}
        serve()
    new = {name: len(variants - before.get(name, set())) for name, variants in found.items()}
    return {name: count for name, count in new.items() if count}


def served_variants(start_up: Callable[[], None] = lambda: None) -> dict[str, int]:
    """Variants that the served default needs for decoding ``BATCHES`` sequences and storing their tokens.

    Args:
        start_up: what is launched before the first request. (Without graphs vLLM itself launches none of our kernels.)
    """
    plan = make_plan(served_spec())
    pages = [torch.zeros(1, layout.page_bytes, dtype=torch.uint8) for layout in plan.layouts]

    def serve() -> None:
        for sequences in BATCHES:
            attend(plan, [1] * sequences)
            shapes = [(sequences, of.num_heads, of.width) for of in plan.layout.streams]
            inputs = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
            store(pages, plan, torch.zeros(sequences, dtype=torch.int64), inputs)

    return new_variants(start_up, serve)
