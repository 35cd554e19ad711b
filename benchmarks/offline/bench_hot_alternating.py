"""Two groups of sequences that take turns, with a pool of hot blocks for three quarters of both, and without one.

    python benchmarks/offline/bench_hot_alternating.py --methods x chain-2

A pool that thrashed would promote blocks in every turn and be slower than none. Both engines live at the same time and
work in turns; a ratio is taken round by round. A round is one turn of each group.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.cpu.machine import machine_facts  # noqa: E402
from benchmarks.cpu.timing import Spread, ratios  # noqa: E402
from benchmarks.files import write_json  # noqa: E402
from benchmarks.methods import METHODS, Method  # noqa: E402
from benchmarks.offline.engines import Engine, Engines  # noqa: E402

_BLOCK = 32
_HELD = 0.75


class _Turns(Engine):
    module = "benchmarks.offline.turns"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what it printed."""
    options = _options(arguments)
    result = {
        "benchmark": "hot_alternating",
        "machine": machine_facts(),
        "model": Path(options.model).name,
        "sequences": options.sequences,
        "context": options.context,
        "decoded": options.decoded,
        "compiled": not options.enforce_eager,
        "rows": [measure(METHODS[name], options) for name in options.methods],
    }
    if options.out:
        write_json(options.out, result)
    print(json.dumps(result) if options.json else text(result))
    return result


def measure(method: Method, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of rounds of a method with a pool and without, and their ratio."""
    length = -(-(options.context + options.decoded) // _BLOCK) * _BLOCK
    pool = int(_HELD * 2 * options.sequences * length) // _BLOCK * _BLOCK
    # One block more: vLLM's null block, which is never hot.
    pool_bytes = (pool + _BLOCK) * _plain_bytes(options.model)
    variants = {"hot": pool_bytes, "not hot": 0}
    arguments = {
        "model": options.model,
        "dtype": "bfloat16",
        "block_size": _BLOCK,
        "max_model_len": length,
        "max_num_seqs": options.sequences,
        "kv_cache_memory_bytes": options.cache_mib << 20,
        "enforce_eager": options.enforce_eager,
        "seed": 0,
    }
    methods = []
    for name, hot in variants.items():
        settings = {**method.engine["additional_config"]["xquant"], "hot": hot}
        engine = {**method.engine, "additional_config": {"xquant": settings}}
        methods.append(replace(method, name=name, engine=engine))
    taken: dict[str, list[float]] = {name: [] for name in variants}
    with Engines(methods, arguments, options.logs / method.name, _Turns) as engines:
        if engines.absent:
            raise SystemExit("; ".join(engines.absent.values()))
        for number in range(options.rounds + 1):
            for engine in engines.engines:
                turns = [_turn(engine, group, options) for group in range(2)]
                if number:  # the first fills the prefix cache
                    taken[engine.method.name].append(sum(turns))
    return {
        "method": method.name,
        "pool_tokens": pool,
        "seconds": {name: Spread.of(of).scaled(1) for name, of in taken.items()},
        "ratio": ratios(taken, "hot", "not hot").scaled(1),
    }


def _turn(engine: Engine, group: int, options: argparse.Namespace) -> float:
    order = {"group": group, "sequences": options.sequences, "context": options.context, "decoded": options.decoded}
    seconds: float = engine.run(what="turn", **order)["seconds"]
    return seconds


def _plain_bytes(model: str) -> int:
    """Bytes of a token's keys and values with 16 bit, in all layers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * config.num_hidden_layers * config.num_key_value_heads * size


def text(result: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{result['model']}, two groups of {result['sequences']} sequences of {result['context']} tokens take turns of "
        f"{result['decoded']} tokens; the pool holds three quarters of them; above 1 the pool is faster, quartiles in "
        "brackets"
    ]
    for row in result["rows"]:
        ratio, seconds = row["ratio"], row["seconds"]
        lines.append(
            f"  {row['method']:12s} {ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})   a round takes "
            f"{seconds['hot']['median']:.2f} s, without a pool {seconds['not hot']['median']:.2f} s"
        )
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    of_xquant = [name for name, method in METHODS.items() if "xquant" in method.engine.get("additional_config", {})]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct-mha"), help="folder")
    parser.add_argument("--methods", nargs="+", choices=of_xquant, default=["x", "chain-2"], help="whose pages")
    parser.add_argument("--sequences", type=int, default=4, help="of each group")
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of a sequence")
    parser.add_argument("--decoded", type=int, default=16, help="tokens of a sequence in a turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each group")
    parser.add_argument("--cache-mib", type=int, default=768, help="of each engine, the pool included")
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "bench_hot_alternating", help="folder of the logs")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there, too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
