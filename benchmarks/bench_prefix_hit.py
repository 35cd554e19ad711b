"""Time to the first token of a prefix hit, against prefilling the same prompt with the 16-bit cache.

    python benchmarks/bench_prefix_hit.py --model models/smollm2-135m-instruct-mha --methods xquant-cl-2

The prefix is in pages, but its blocks are not hot: other prompts have taken their place in the pool, so they are
promoted before they are attended from it. Engines live at the same time and take turns, as in bench_offline.py. What is
printed is explained in docs/benchmarks.md.
"""

import argparse
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

# Of vLLM's blocks on CPUs, which the prefix cache knows as a whole.
_BLOCK = 128


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what it printed."""
    options = _options(arguments)
    return report(run(options), text, options)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the engines and measure."""
    prefix = -(-options.prefix // _BLOCK) * _BLOCK
    engine_arguments = {
        "model": options.model,
        "dtype": "bfloat16",
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "kv_cache_memory_bytes": options.cache_mib << 20,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    names = [BASELINE, *(name for name in options.methods if name != BASELINE)]
    methods = [served(METHODS[name], Path(options.model)) for name in names]
    with Engines(methods, engine_arguments, options.logs) as engines:
        taken: dict[str, list[dict[str, Any]]] = {engine.method.name: [] for engine in engines.engines}
        for turn in range(-1, options.rounds):  # the first is not counted
            for engine in engines.engines:
                name = engine.method.name
                order = {"prefix": prefix, "question": options.question, "hit": name != BASELINE, "seed": turn + 1}
                answer = engine.run("first_token", **order)
                if turn >= 0:
                    taken[name].append(answer)
        cache_tokens, absent = engines.cache_tokens, engines.absent
    return {
        "benchmark": "prefix hit",
        "machine": machine_facts(),
        "model": Path(options.model).name,
        "prefix": prefix,
        "question": options.question,
        "cache_mib": options.cache_mib,
        "settings": {name: METHODS[name].settings() for name in names},
        "compiled": not options.enforce_eager,
        "cache_tokens": cache_tokens,
        "absent": absent,
        "rows": rows(taken),
    }


def rows(taken: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One per method: milliseconds, as a share of the 16-bit cache's in the same round, and what the pool did."""
    found = []
    plain = taken[BASELINE]
    for name, turns in taken.items():
        pairs = zip(turns, plain, strict=True)
        row: dict[str, Any] = {"method": name, "milliseconds": Spread.of([x["seconds"] for x in turns]).scaled(1e3)}
        row["ratio"] = Spread.of([ours["seconds"] / other["seconds"] for ours, other in pairs]).scaled(1)
        for key in ("cached", "pool_tokens", "promoted_tokens", "hot_rows", "cold_rows"):
            row[key] = Spread.of([turn[key] for turn in turns]).median
        found.append(row)
    return found


def text(result: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{result['model']}, {result['prefix']} tokens of prefix and {result['question']} new ones, time to the first "
        f"token; the 16-bit cache prefills all, the others have the prefix in pages; quartiles in brackets"
    ]
    for row in result["rows"]:
        time, ratio = row["milliseconds"], row["ratio"]
        lines.append(
            f"  {METHODS[row['method']].label:24s} {time['median']:7.1f} ms ({time['low']:.1f}-{time['high']:.1f})  "
            f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})  {row['promoted_tokens']:.0f} tokens "
            f"promoted, pool of {row['pool_tokens']:,.0f}"
        )
    caches = (f"{METHODS[name].label} {tokens:,}" for name, tokens in result["cache_tokens"].items())
    lines.append(f"  cache tokens in {result['cache_mib']} MiB: {', '.join(caches)}")
    lines += [f"  not here: {why}" for why in result["absent"].values()]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct-mha"), help="folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["xquant-cl-2"], help="beside 16bit")
    parser.add_argument("--prefix", type=int, default=1500, help="tokens, rounded up to blocks of 128")
    parser.add_argument("--question", type=int, default=16, help="new tokens behind them")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every method, and one that is not counted")
    parser.add_argument("--max-model-len", type=int, default=2304, help="of every engine")
    parser.add_argument("--max-num-seqs", type=int, default=8, help="of every engine")
    parser.add_argument("--cache-mib", type=int, default=768, help="of every method")
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "bench_prefix_hit", help="folder of the logs")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there, too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
