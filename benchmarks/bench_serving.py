"""Serve a model with every cache in turn, in the same memory, under the same load over HTTP, and compare.

    python benchmarks/bench_serving.py --quick
    python benchmarks/bench_serving.py --methods 16bit fp8 kivi xquant xquant-cl --trace pressure --repeats 3
    python benchmarks/bench_serving.py --methods 16bit xquant --trace-file requests.jsonl --trace-scale-lengths 0.0625

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
from benchmarks.methods import BASELINE, METHODS, UNCALIBRATED, Method  # noqa: E402
from benchmarks.serving import report  # noqa: E402
from benchmarks.serving.client import send  # noqa: E402
from benchmarks.serving.metrics import Watch  # noqa: E402
from benchmarks.serving.sizes import CONCURRENCY, FULL, PRESSURE, QUICK, make_trace, plain_cache_tokens  # noqa: E402
from benchmarks.serving.timed_client import replay_over_http  # noqa: E402
from benchmarks.serving.trace import RunningText, Trace  # noqa: E402
from benchmarks.serving.trace_file import FileTrace, Scale, file_trace  # noqa: E402
from examples.vllm_process import Progress, ServerError, VllmServer, free_port  # noqa: E402
from xquant_vllm.errors import RefusedError  # noqa: E402
from xquant_vllm.offline.texts import python_docs_to_evaluate  # noqa: E402
from xquant_vllm.planning.traces.replay import Rates  # noqa: E402

_STARTUP_SECONDS = 900
_CACHE_TOKENS = r"KV cache size: ([\d,]+) tokens"
_SERVER_OPTIONS = ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = parse(arguments)
    try:
        result = run(options)
    except (ServerError, RefusedError) as error:
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
    sizes = QUICK if options.quick else FULL
    cache_mib = options.cache_mib or sizes.cache_mib
    text, plain_tokens = _read_model(options, cache_mib << 20)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    cache_tokens: dict[str, int] = {}
    on_cpu = not torch.cuda.is_available()
    absent = {name: why for name in options.methods if on_cpu and (why := METHODS[name].absent_on_cpu)}
    about: dict[str, Any] = {}
    for repeat in range(options.repeats):
        trace: Trace | FileTrace
        if options.trace_file is None:
            # Other texts in every repeat, the same for every method.
            trace, about = make_trace(
                options.trace, sizes, text, plain_tokens, repeat, options.pressure, options.concurrency
            )
        else:
            trace, about = _from_file(options)
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
    if not any(runs.values()):
        raise ServerError("; ".join(f"{METHODS[name].label}: {why}" for name, why in absent.items()))
    return {
        "benchmark": "serving",
        "machine": machine_facts(),
        "model": Path(options.model).name,
        "cache_mib": cache_mib,
        "settings": {name: METHODS[name].settings() for name in options.methods},
        "compiled": not options.enforce_eager,
        "server": {name: getattr(options, name) for name in _SERVER_OPTIONS},
        "trace": about,
        "repeats": options.repeats,
        "rows": report.summarize({name: of for name, of in runs.items() if of}, cache_tokens),
        "absent": absent,
    }


def _from_file(options: argparse.Namespace) -> tuple[FileTrace, dict[str, Any]]:
    """The load of --trace-file, and what a result says of it."""
    from transformers import AutoConfig

    scale = Scale(options.trace_scale_lengths, options.trace_scale_times, options.trace_requests)
    vocabulary = AutoConfig.from_pretrained(options.model).get_text_config().vocab_size
    load = file_trace(options.trace_file, scale, vocabulary, options.max_model_len)
    about = {"name": "file", "requests": len(load.prompts), "prompt_tokens": load.trace.prompt_tokens}
    about |= {"scale_lengths": scale.lengths, "scale_times": scale.times, "tokens_per_hash_id": scale.block_size}
    return load, about | {"endless_hit_rate": load.planned_hit_rate(1 << 40, Rates())}


def _read_model(options: argparse.Namespace, cache_bytes: int) -> tuple[RunningText, int]:
    """Text in the model's tokens, and how many tokens a 16-bit cache holds."""
    from transformers import AutoConfig, AutoTokenizer

    text = RunningText(AutoTokenizer.from_pretrained(options.model), python_docs_to_evaluate())
    item_bytes = 4 if options.dtype == "float32" else 2
    return text, plain_cache_tokens(AutoConfig.from_pretrained(options.model), cache_bytes, item_bytes)


def serve(
    method: Method, trace: Trace | FileTrace, cache_mib: int, options: argparse.Namespace
) -> tuple[dict[str, Any], int]:
    """One server's life: what was measured, and how many tokens its cache holds."""
    arguments = [options.model, "--kv-cache-memory-bytes", str(cache_mib << 20)]
    for name in _SERVER_OPTIONS:
        if getattr(options, name) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    arguments += [*method.flags(), *(["--enforce-eager"] if options.enforce_eager else [])]
    log = options.logs / f"{method.name}.log"
    with VllmServer(arguments, log, free_port()) as server:
        server.wait(server.is_healthy, "it was ready", _STARTUP_SECONDS, Progress(method.label))
        found = server.find(_CACHE_TOKENS)
        assert found is not None
        with Watch(server.url) as watch:
            if isinstance(trace, FileTrace):
                measured = replay_over_http(trace, server.url, options.model)
            else:
                measured = send(trace, server.url, options.model, log.with_name(f"{method.name}-client.log"))
    queries, hits = watch.counts["prefix_queries"], watch.counts["prefix_hits"]
    measured |= {
        "peak_running": watch.peak_running,
        "peak_waiting": watch.peak_waiting,
        "preemptions": watch.counts["preemptions"],
        "prefix_hit_rate": hits / queries if queries else 0.0,
    }
    cache_tokens = int(found.group(1).replace(",", ""))
    if isinstance(trace, FileTrace):
        measured["planned_hit_rate"] = trace.planned_hit_rate(cache_tokens, server_rates(measured, options))
    return measured, cache_tokens


def server_rates(measured: dict[str, Any], options: argparse.Namespace) -> Rates:
    """How fast requests of a trace's file went, so that the plan's replay holds blocks as long as the server did."""
    computed = measured["total_input_tokens"] * (1 - measured["prefix_hit_rate"])
    decode = 1e3 / measured["mean_tpot_ms"] if measured["mean_tpot_ms"] else Rates().decode
    return Rates(computed / measured["duration"], decode, options.max_num_seqs)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="folder or hub name")
    parser.add_argument("--methods", "--backends", nargs="+", choices=UNCALIBRATED, help="caches to compare")
    parser.add_argument("--trace", choices=("pressure", "arrivals"), default="pressure", help="the load")
    parser.add_argument(
        "--pressure",
        type=float,
        default=PRESSURE,
        help="all histories of the load pressure, in times what 16 bit holds (default %(default)s, which fits 4 bits)",
    )
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY, help="requests of the load pressure under way")
    parser.add_argument("--trace-file", type=Path, metavar="FILE", help="a load of requests with hash_ids, as `xquant "
                        "plan --trace` reads them, sent at their times instead of --trace")  # fmt: skip
    parser.add_argument("--trace-scale-lengths", type=float, default=1.0, metavar="F", help="of --trace-file: multiply "
                        "lengths, such as 0.0625: blocks of 32 tokens (then also set --block-size 32)")  # fmt: skip
    parser.add_argument("--trace-scale-times", type=float, default=1.0, metavar="F", help="likewise arrival times")
    parser.add_argument("--trace-requests", type=int, metavar="N", help="of --trace-file: only the first N")
    parser.add_argument("--quick", action="store_true", help="16 bit and xquant, a short load, once: five minutes")
    parser.add_argument("--repeats", type=int, help="of every method, interleaved (default 3, with --quick 1)")
    parser.add_argument("--cache-mib", type=int, help="cache memory of every method")
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument("--max-model-len", type=int, default=2048, help="of every server")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="of every server")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="of every server")
    parser.add_argument("--block-size", type=int, help="of every server (default: vLLM's)")
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "bench_serving", help="folder of the logs")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there, and a plot beside it")
    options = parser.parse_args(arguments)
    if options.methods is None:
        options.methods = [BASELINE, "xquant"] if options.quick else [*UNCALIBRATED]
    if options.repeats is None:
        options.repeats = 1 if options.quick else 3
    options.enforce_eager |= options.quick
    return options


if __name__ == "__main__":
    sys.exit(main())
