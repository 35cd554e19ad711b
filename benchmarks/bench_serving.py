"""Serve a model with every cache in turn, in the same memory, under the same load over HTTP, and compare.

    python benchmarks/bench_serving.py --quick
    python benchmarks/bench_serving.py --methods 16bit fp8 kivi xquant xquant-cl --trace pressure --repeats 3

One server at a time, `vllm serve` as users start it, and vLLM's own `vllm bench serve` as the client. Repeats are
interleaved: every method once, then every method again. What is printed is explained in docs/benchmarks.md.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.cpu.machine import machine_facts  # noqa: E402
from benchmarks.files import write_json  # noqa: E402
from benchmarks.methods import BASELINE, METHODS, Method  # noqa: E402
from benchmarks.serving import report  # noqa: E402
from benchmarks.serving.client import send  # noqa: E402
from benchmarks.serving.metrics import Watch  # noqa: E402
from benchmarks.serving.trace import Trace, arrivals, pressure  # noqa: E402
from examples.vllm_process import Progress, ServerError, VllmServer, free_port  # noqa: E402
from xquant_vllm.offline.texts import python_docs_to_evaluate  # noqa: E402

_STARTUP_SECONDS = 900
_CACHE_TOKENS = r"KV cache size: ([\d,]+) tokens"
# Sizes of the loads: a pressure load's histories take about 0.9 of what xquant's cache holds at 4 bits, three times
# what 16 bit holds.
_SIZES: dict[str, dict[str, Any]] = {
    "quick": {
        "cache_mib": 96,
        "pressure": {"users": 16, "turns": 4, "history_words": 480, "turn_words": 24, "output_tokens": 8},
        "arrivals": {"requests": 16, "rate": 1.0, "prompt_words": 128, "output_tokens": 16},
    },
    "full": {
        "cache_mib": 192,
        "pressure": {"users": 24, "turns": 8, "history_words": 640, "turn_words": 24, "output_tokens": 12},
        "arrivals": {"requests": 96, "rate": 1.0, "prompt_words": 256, "output_tokens": 64},
    },
}
_CONCURRENCY = 4


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = parse(arguments)
    try:
        result = run(options)
    except ServerError as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 1
    if options.out:
        write_json(options.out, result)
        report.plot(result, options.out.with_suffix(".png"))
    print(json.dumps(result) if options.json else report.table(result))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Serve and measure.

    Raises:
        ServerError: no server runs at all, or one failed in the middle.
    """
    sizes = _SIZES["quick" if options.quick else "full"]
    cache_mib = options.cache_mib or sizes["cache_mib"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    cache_tokens: dict[str, int] = {}
    on_cpu = not torch.cuda.is_available()
    absent = {name: why for name in options.methods if on_cpu and (why := METHODS[name].absent_on_cpu)}
    trace: Trace | None = None
    for repeat in range(options.repeats):
        # Other texts in every repeat, the same for every method.
        trace = make_trace(options.trace, sizes[options.trace], repeat)
        for method in (METHODS[name] for name in options.methods if name not in absent):
            print(f"{method.label}, repeat {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
            try:
                measured, cache_tokens[method.name] = serve(method, trace, cache_mib, options)
            except ServerError as error:
                if repeat or method.name == BASELINE:
                    raise
                absent[method.name] = str(error)
            else:
                runs[method.name].append(measured)
    assert trace is not None
    return {
        "benchmark": "serving",
        "machine": machine_facts(),
        "model": Path(options.model).name,
        "cache_mib": cache_mib,
        "compiled": not options.enforce_eager,
        "trace": {"name": trace.name, "requests": len(trace.prompts), **sizes[options.trace]},
        "repeats": options.repeats,
        "rows": report.summarize({name: of for name, of in runs.items() if of}, cache_tokens),
        "absent": absent,
    }


def make_trace(name: str, sizes: dict[str, Any], seed: int) -> Trace:
    """The load of a repeat."""
    text = python_docs_to_evaluate()
    if name == "pressure":
        return pressure(text, concurrency=_CONCURRENCY, seed=seed, **sizes)
    return arrivals(text, seed=seed, **sizes)


def serve(method: Method, trace: Trace, cache_mib: int, options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """One server's life: what was measured, and how many tokens its cache holds."""
    arguments = [options.model, "--dtype", options.dtype, "--max-model-len", str(options.max_model_len)]
    arguments += ["--kv-cache-memory-bytes", str(cache_mib << 20), "--max-num-seqs", str(options.max_num_seqs)]
    arguments += ["--max-num-batched-tokens", str(options.max_num_batched_tokens)]
    arguments += [*method.flags(), *(["--enforce-eager"] if options.enforce_eager else [])]
    log = options.logs / f"{method.name}.log"
    with VllmServer(arguments, log, free_port()) as server:
        server.wait(server.is_healthy, "it was ready", _STARTUP_SECONDS, Progress(method.label))
        found = server.find(_CACHE_TOKENS)
        assert found is not None
        with Watch(server.url) as watch:
            measured = send(trace, server.url, options.model, log.with_name(f"{method.name}-client.log"))
    queries, hits = watch.counts["prefix_queries"], watch.counts["prefix_hits"]
    measured |= {
        "peak_running": watch.peak_running,
        "peak_waiting": watch.peak_waiting,
        "preemptions": watch.counts["preemptions"],
        "prefix_hit_rate": hits / queries if queries else 0.0,
    }
    return measured, int(found.group(1).replace(",", ""))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="folder or hub name")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="caches to compare")
    parser.add_argument("--trace", choices=("pressure", "arrivals"), default="pressure", help="the load")
    parser.add_argument("--quick", action="store_true", help="16 bit and xquant, a short load, once: five minutes")
    parser.add_argument("--repeats", type=int, help="of every method, interleaved (default 3, with --quick 1)")
    parser.add_argument("--cache-mib", type=int, help="cache memory of every method")
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument("--max-model-len", type=int, default=2048, help="of every server")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="of every server")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="of every server")
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "bench_serving", help="folder of the logs")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there, and a plot beside it")
    options = parser.parse_args(arguments)
    if options.methods is None:
        options.methods = [BASELINE, "xquant"] if options.quick else [*METHODS]
    if options.repeats is None:
        options.repeats = 1 if options.quick else 3
    options.enforce_eager |= options.quick
    return options


if __name__ == "__main__":
    sys.exit(main())
