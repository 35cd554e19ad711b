"""Storing new tokens on CPUs: xquant's quantizing store and vLLM's copy of BF16, in turns, as shares of copy bandwidth.

    python benchmarks/bench_store.py --tokens 8 512

A call goes through as many layers as the model has, each with pages of its own. What is printed is explained in
docs/benchmarks.md.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.cpu.layers import BLOCK_SIZE, MODELS, Model, filled_pages, latents, make_plan  # noqa: E402
from benchmarks.cpu.operation import BASELINE, add_options, report, variant_row  # noqa: E402
from benchmarks.cpu.plain import PlainLayers  # noqa: E402
from benchmarks.cpu.roofs import roof_calls, roofs_of  # noqa: E402
from benchmarks.cpu.timing import in_turns  # noqa: E402
from benchmarks.cpu.work import Work, store_work  # noqa: E402
from xquant_vllm.attention.cpu import kernels as cpu  # noqa: E402


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 512], help="stored by one call in every layer")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = [
        row
        for model in (MODELS[name] for name in options.models)
        for tokens in options.tokens
        for row in _rows(model, tokens, options)
    ]
    return report("store", rows, options)


def _rows(model: Model, tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    blocks = max(4, -(-tokens // BLOCK_SIZE))
    slots = torch.randperm(blocks * BLOCK_SIZE, generator=torch.Generator().manual_seed(5))[:tokens]
    calls: dict[str, Callable[[], object]] = {BASELINE: PlainLayers(model, blocks, model.layers).store(tokens, slots)}
    work = {BASELINE: Work(2.0 * tokens * 2 * model.kv_heads * model.head_size * 2)}
    for bits in options.bits:
        plan = make_plan(model, "latents", bits, 16)
        pages, inputs = filled_pages(plan, blocks, model.layers), latents(plan, tokens)

        def store(plan: Any, pages: list[torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> None:
            for of_layer in pages:
                cpu.store((of_layer,), plan, slots, inputs)

        name = f"xquant {bits} bits"
        calls[name] = partial(store, plan, pages, inputs)
        work[name] = store_work(plan, tokens)
    taken = in_turns({**calls, **roof_calls()}, options.rounds)
    roofs = roofs_of(taken)
    return [
        {"model": model.name, "shape": f"{tokens} tokens", "tokens": tokens}
        | variant_row(name, taken, model.layers, work[name], roofs)
        for name in calls
    ]


if __name__ == "__main__":
    main()
