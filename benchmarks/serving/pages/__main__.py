"""Prompts whose pages another engine has left in files: bytes per token, and the time to the first token.

    python -m benchmarks.serving.pages --model models/smollm2-135m-instruct --methods xquant xquant-2

Every cache goes through the same connector, the 16-bit one too. A request is computed, served from files, and served
from the engine's own prefix cache. Engines live at the same time and take turns. The last line is the result as JSON.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cpu.machine import machine_facts
from benchmarks.cpu.timing import Spread
from benchmarks.files import write_json
from benchmarks.methods import BASELINE, METHODS, Method
from benchmarks.models import served
from benchmarks.offline.engines import Engine, Engines

ROOT = Path(__file__).resolve().parents[3]
# Of vLLM's blocks on CPUs, which a file has one of.
_BLOCK = 128
_TIMES = ("computed", "files", "own", "read_seconds", "written_seconds")
_TITLES = {"computed": "computed", "files": "from files", "read_seconds": "of it reading", "own": "own cache"}


class _Pages(Engine):
    module = "benchmarks.serving.pages.engine"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what it printed."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as pages:
        result = run(options, Path(pages))
    if options.out:
        write_json(options.out, result)
    print(text(result))
    print(json.dumps(result))
    return result


def run(options: argparse.Namespace, pages: Path) -> dict[str, Any]:
    """Start the engines and measure."""
    prefix = -(-options.prefix // _BLOCK) * _BLOCK
    engine_arguments = {
        "model": options.model,
        "dtype": "bfloat16",
        "max_model_len": options.max_model_len,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": options.cache_mib << 20,
        "block_size": _BLOCK,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    names = [BASELINE, *(name for name in options.methods if name != BASELINE)]
    methods = [_connected(served(METHODS[name], Path(options.model)), pages) for name in names]
    taken: dict[str, list[dict[str, Any]]] = {}
    with Engines(methods, engine_arguments, options.logs, _Pages) as engines:
        for turn in range(-1, options.rounds):  # the first is not counted
            for engine in engines.engines:
                answer = engine.run("hit", prefix=prefix, question=options.question, seed=turn + 1)
                if turn >= 0:
                    taken.setdefault(engine.method.name, []).append(answer)
            for written in pages.iterdir():
                shutil.rmtree(written)
        absent = engines.absent
    return {
        "benchmark": "pages",
        "machine": machine_facts(),
        "model": Path(options.model).name,
        "prefix": prefix,
        "question": options.question,
        "settings": {name: METHODS[name].settings() for name in names},
        "compiled": not options.enforce_eager,
        "absent": absent,
        "rows": rows(taken),
    }


def _connected(method: Method, pages: Path) -> Method:
    """The method with the connector."""
    transfer = {
        "kv_connector": "XQuantConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": str(pages), "size": 0},
    }
    if "additional_config" not in method.engine:
        plain = {"kv_connector": "PlainPages", "kv_connector_module_path": "benchmarks.serving.pages.plain"}
        transfer |= {**plain, "kv_load_failure_policy": "recompute"}
    return dataclasses.replace(method, engine={**method.engine, "kv_transfer_config": transfer})


def rows(taken: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One per method: bytes per token, milliseconds, and how a hit compares with the 16-bit cache's."""
    found = []
    for name, turns in taken.items():
        row: dict[str, Any] = {"method": name}
        for key in ("read", "written"):
            (row[f"{key}_bytes_per_token"],) = {turn[f"{key}_bytes"] / turn["tokens"] for turn in turns}
        for key in _TIMES:
            row[f"{key}_ms"] = Spread.of([turn[key] for turn in turns]).scaled(1e3)
        if BASELINE in taken:
            pairs = list(zip(turns, taken[BASELINE], strict=True))
            row["bytes_ratio"] = pairs[0][1]["read_bytes"] / pairs[0][0]["read_bytes"]
            row["files_ratio"] = Spread.of([ours["files"] / plain["files"] for ours, plain in pairs]).scaled(1)
        found.append(row)
    return found


def text(result: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{result['model']}, {result['prefix']} tokens in files and {result['question']} new ones: bytes per token, "
        "and milliseconds to the first token (median, quartiles in brackets)"
    ]
    for row in result["rows"]:
        times = []
        for key, title in _TITLES.items():
            spread = row[f"{key}_ms"]
            times.append(f"{title} {spread['median']:.1f} ({spread['low']:.1f}-{spread['high']:.1f})")
        fewer = f" {row['bytes_ratio']:.2f}x fewer" if "bytes_ratio" in row else ""
        label = METHODS[row["method"]].label
        lines.append(f"  {label:26s} {row['read_bytes_per_token']:9,.1f} B{fewer}  {', '.join(times)}")
    lines += [f"  not here: {why}" for why in result["absent"].values()]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    names = [name for name in METHODS if "kivi" not in name and METHODS[name].absent_on_cpu is None]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.pages", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="folder")
    parser.add_argument("--methods", nargs="+", choices=names, default=["xquant", "xquant-2"], help="beside 16bit")
    parser.add_argument("--prefix", type=int, default=1500, help="tokens in files, rounded up to blocks of 128")
    parser.add_argument("--question", type=int, default=16, help="new tokens behind them")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every method, and one that is not counted")
    parser.add_argument("--max-model-len", type=int, default=2304, help="of every engine")
    parser.add_argument("--cache-mib", type=int, default=512, help="of every engine")
    parser.add_argument("--folder", type=Path, help="where files are written, in a folder of its own (default: where "
                        "temporary files go)")  # fmt: skip
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "bench_pages", help="folder of the logs")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there, too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
