"""Serve a mixed load with every cache in turn, and say what was left of it.

    python -m benchmarks.soak --requests 200
    python -m benchmarks.soak --requests 10000 --caches 16bit x

Each cache gets its share of the requests and its own `vllm serve`, with so few blocks that requests are preempted.
Whole and streamed answers, several answers, log-probabilities and shared prefixes are mixed with clients that leave and
with invalid requests. One engine core is killed. The last line of the output is one JSON object, explained in
docs/benchmarks.md. The exit code is 1 if anything is not as it should be.
"""

import argparse
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.soak import caches, result
from benchmarks.soak.life import Soak, Turn
from benchmarks.soak.load import Load
from examples.vllm_process import ServerError
from xquant_vllm.offline.texts import python_docs_to_evaluate

ROOT = Path(__file__).resolve().parent.parent.parent
# Of one run to the next at 200 requests.
_MORE_THAN_CONTROL_MB = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Soak; returns the exit code."""
    options = parse(arguments)
    options.logs.mkdir(parents=True, exist_ok=True)
    model = options.model or caches.make_model(options.logs / "model", options.tokenizer)
    words = python_docs_to_evaluate().split()
    share = math.ceil(options.requests / len(options.caches))

    def soak(name: str) -> Turn:
        cache = caches.CACHES[name]
        print(f"soak: {name}, {share} requests", file=sys.stderr, flush=True)
        served = caches.calibrated_joint(model, options.logs / "joint") if cache.calibrated else model
        return Soak(cache, served, options.logs, Load(words, options.seed, not cache.speculates)).run(share)

    try:
        with ThreadPoolExecutor(options.at_once) as pool:
            turns = dict(zip(options.caches, pool.map(soak, options.caches), strict=True))
    except ServerError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    summary = result.summary(turns)
    faults = result.faults(summary, _MORE_THAN_CONTROL_MB)
    for fault in faults:
        print(f"soak: {fault}", file=sys.stderr)
    print(json.dumps(summary))
    return 1 if faults else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="of all caches together (default 200)")
    parser.add_argument("--caches", nargs="+", choices=caches.CACHES, default=[*caches.CACHES], help="default: all")
    parser.add_argument("--model", type=Path, help="serve this checkpoint instead of a tiny random one")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "smollm2-135m-instruct",
                        help="checkpoint whose tokenizer the tiny model gets")  # fmt: skip
    parser.add_argument("--at-once", type=int, default=2, help="servers at a time (default 2: starting takes longest)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "soak", help="folder of the logs and checkpoints")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
