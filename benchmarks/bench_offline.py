"""Prefill and decode throughput at equal batch, through vLLM without HTTP, every method against the 16-bit cache.

    python benchmarks/bench_offline.py --contexts 512 4096 --methods 16bit xquant kivi

All engines live at the same time and work in turns, so that what else the machine does falls on all of them; a ratio is
taken round by round. What is printed is explained in docs/benchmarks.md.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.cpu.machine import machine_facts  # noqa: E402
from benchmarks.cpu.timing import Spread  # noqa: E402
from benchmarks.files import report  # noqa: E402
from benchmarks.methods import BASELINE, METHODS  # noqa: E402
from benchmarks.models import served  # noqa: E402
from benchmarks.offline.engines import Engines  # noqa: E402

# Tokens that the first sequences may decode while the others are prefilled.
_DECODED_EARLY = 240


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what it printed."""
    options = _options(arguments)
    return report(run(options), text, options)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the engines and measure."""
    longest = max(options.contexts) + options.steps + _DECODED_EARLY
    engine_arguments = {
        "model": options.model,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len or longest,
        "max_num_seqs": options.sequences,
        "kv_cache_memory_bytes": options.cache_mib << 20,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": options.same_prompts is not None,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    names = [BASELINE, *(name for name in options.methods if name != BASELINE)]
    rows = []
    methods = [served(METHODS[name], Path(options.model)) for name in names]
    with Engines(methods, engine_arguments, options.logs) as engines:
        for context in options.contexts:
            same_prompts = options.same_prompts is not None and context >= options.same_prompts
            taken: dict[str, list[dict[str, Any]]] = {engine.method.name: [] for engine in engines.engines}
            for turn in range(options.rounds):
                for engine in engines.engines:
                    seed = 0 if same_prompts else turn
                    order = {"sequences": options.sequences, "context": context, "steps": options.steps, "seed": seed}
                    taken[engine.method.name].append(engine.run("decode", **order))
            rows += [_row(name, context, options.sequences, taken, same_prompts) for name in taken]
        cache_tokens, absent = engines.cache_tokens, engines.absent
    return {
        "benchmark": "offline",
        "machine": machine_facts(),
        "model": Path(options.model).name,
        "sequences": options.sequences,
        "cache_mib": options.cache_mib,
        "settings": {name: METHODS[name].settings() for name in names},
        "compiled": not options.enforce_eager,
        "cache_tokens": cache_tokens,
        "absent": absent,
        "rows": rows,
    }


def _row(
    name: str, context: int, sequences: int, taken: dict[str, list[dict[str, Any]]], same_prompts: bool
) -> dict[str, Any]:
    steps = {method: [statistics.median(turn["steps"]) for turn in turns] for method, turns in taken.items()}
    prefills = {method: [turn["prefill"] for turn in turns] for method, turns in taken.items()}
    row: dict[str, Any] = {"method": name, "context": context}
    rows = {which: sum(turn[f"{which}_rows"] for turn in taken[name]) for which in ("hot", "cold")}
    if any(rows.values()):  # there is a pool
        row["hot_share"] = rows["hot"] / sum(rows.values())
    for what, seconds, tokens in (("decode", steps, sequences), ("prefill", prefills, sequences * context)):
        if what == "prefill" and same_prompts:
            continue
        row[f"{what}_tokens_per_second"] = Spread.of([tokens / taken for taken in seconds[name]]).scaled(1)
        if BASELINE in seconds:
            pairs = zip(seconds[name], seconds[BASELINE], strict=True)
            row[f"{what}_ratio"] = Spread.of([plain / ours for ours, plain in pairs]).scaled(1)
    return row


def text(result: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{result['model']}, {result['sequences']} sequences decode together; ratios to the 16-bit cache, quartiles in "
        "brackets"
    ]
    for row in result["rows"]:
        cells = []
        for what in ("decode", "prefill"):
            if f"{what}_ratio" not in row:
                continue
            rate, ratio = row[f"{what}_tokens_per_second"], row[f"{what}_ratio"]
            spread = f"({ratio['low']:.2f}-{ratio['high']:.2f})"
            cells.append(f"{what} {rate['median']:7.1f} tokens/s  {ratio['median']:.2f}x {spread}")
        if "hot_share" in row:
            cells.append(f"{row['hot_share']:.0%} of the rows hot")
        lines.append(f"  {row['context']:6d} tokens  {METHODS[row['method']].label:18s} {'   '.join(cells)}")
    caches = (f"{METHODS[name].label} {tokens:,}" for name, tokens in result["cache_tokens"].items())
    lines.append(f"  cache tokens in {result['cache_mib']} MiB: {', '.join(caches)}")
    lines += [f"  not here: {why}" for why in result["absent"].values()]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="folder or hub name")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["xquant", "kivi"], help="beside 16bit")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 4096], help="prompt tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=8, help="that decode together")
    parser.add_argument("--steps", type=int, default=16, help="timed decode steps of a round")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every method")
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument("--max-model-len", type=int, help="of every engine (default: what the longest context needs)")
    parser.add_argument("--cache-mib", type=int, default=1024, help="of every method")
    parser.add_argument(
        "--same-prompts",
        nargs="?",
        type=int,
        const=0,
        metavar="FROM",
        help="the same prompts in every round, from the prefix cache but in the first: measures decoding alone; with a "
        "number only for contexts of at least so many tokens",
    )
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "bench_offline", help="folder of the logs")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there, too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
