"""Decode attention on CPUs: xquant's kernels and vLLM's on BF16 pages, in turns, as shares of what the machine can do.

    python benchmarks/bench_decode_attention.py --contexts 512 4096 --sequences 1 8

A call goes through as many layers as the model has, each with pages of its own, so that caches of the processor help no
more than when serving. What is printed is explained in docs/benchmarks.md.
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

from benchmarks.cpu.layers import BLOCK_SIZE, MODELS, Model, decode_batch, filled_pages, make_plan  # noqa: E402
from benchmarks.cpu.operation import BASELINE, add_options, report, variant_row  # noqa: E402
from benchmarks.cpu.plain import PlainLayers  # noqa: E402
from benchmarks.cpu.roofs import roof_calls, roofs_of  # noqa: E402
from benchmarks.cpu.timing import in_turns  # noqa: E402
from benchmarks.cpu.work import Work, decode_work, plain_decode_bytes  # noqa: E402
from xquant_vllm.attention.cpu import kernels as cpu  # noqa: E402


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 4096], help="cached tokens of a sequence")
    parser.add_argument("--sequences", nargs="+", type=int, default=[8], help="that decode together")
    parser.add_argument("--holds", nargs="+", choices=("latents", "x"), default=["latents"], help="what pages hold")
    parser.add_argument(
        "--not-folded",
        action="store_true",
        help="also with values that are up-projected here, not by the output projection",
    )
    parser.add_argument("--layers", type=int, help="layers of a call (default: as many as the model has)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for model in (MODELS[name] for name in options.models):
        for sequences in options.sequences:
            for context in options.contexts:
                rows += _rows(model, sequences, context, options)
    return report("decode attention", rows, options)


def _rows(model: Model, sequences: int, context: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    layers = options.layers or model.layers
    batch = decode_batch(sequences, context)
    blocks = sequences * -(-context // BLOCK_SIZE)
    query = torch.randn(sequences, model.heads, model.head_size, generator=torch.Generator().manual_seed(5)).bfloat16()
    output = torch.empty_like(query)
    plain = PlainLayers(model, blocks, layers)
    calls: dict[str, Callable[[], object]] = {BASELINE: plain.decode(query, batch, output)}
    arithmetic = float(sequences * context * 2 * model.heads * model.head_size)
    work = {BASELINE: Work(plain_decode_bytes(model.kv_heads, model.head_size, sequences, context), arithmetic)}
    for holds in options.holds:
        for bits in options.bits:
            name = f"{'xquant' if holds == 'latents' else 'xquant X'} {bits} bits"
            plans = {name: make_plan(model, holds, bits, context)}
            if options.not_folded and holds == "latents":
                plans[f"{name}, not folded"] = make_plan(model, holds, bits, context, fold_values=False)
            pages = filled_pages(plans[name], blocks, layers)

            def attend(plan: Any, pages: list[torch.Tensor]) -> None:
                for of_layer in pages:
                    cpu.paged_attention(query, (of_layer,), plan, batch, output)

            for variant, plan in plans.items():
                calls[variant] = partial(attend, plan, pages)
                work[variant] = decode_work(plan, sequences, context)
    taken = in_turns({**calls, **roof_calls()}, options.rounds)
    roofs = roofs_of(taken)
    return [
        {"model": model.name, "shape": f"{sequences} x {context}", "sequences": sequences, "context": context}
        | variant_row(name, taken, layers, work[name], roofs)
        for name in calls
    ]


if __name__ == "__main__":
    main()
