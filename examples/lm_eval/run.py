"""Serve a checkpoint with vLLM, run lm-eval on it over HTTP, and stop the server.

lm-eval may live in an environment of its own (pip install "lm-eval[api]" transformers):

    python examples/lm_eval/run.py models/smollm2-135m-instruct --lm-eval ~/lm-eval/bin/lm_eval --bits 4
    python examples/lm_eval/run.py models/smollm2-135m-instruct --lm-eval ~/lm-eval/bin/lm_eval --backend CPU_ATTN

What follows `--` are further options of vllm serve. The last line on stdout is a JSON object with the metrics of each
task.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import make_dataset  # noqa: E402
from makers.packages import MissingPackageError  # noqa: E402
from vllm_process import Progress, ServerError, VllmServer, free_port  # noqa: E402

TASKS = ("xquant_orders", "xquant_world", "xquant_functions", "xquant_continuation", "xquant_pages")
NAME = "evaluated"
STARTUP_SECONDS = 600
MAX_MODEL_LEN = 2048
CONCURRENT = 8
# Holds all texts of xquant_orders in 16 bit, so that each is computed once and not once per question.
CACHE_BYTES = 3 << 30
_BYTES = r"layers take ([\d,]+) bytes per token"


def server_arguments(options: argparse.Namespace) -> list[str]:
    """What the server is started with."""
    arguments = [str(options.model), "--attention-backend", options.backend, "--served-model-name", NAME]
    arguments += ["--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", str(CACHE_BYTES)]
    arguments += ["--dtype", options.dtype, "--enforce-eager"]
    settings = {} if options.settings is None else json.loads(options.settings)
    if options.bits is not None:
        settings["bits"] = options.bits
    if settings:
        arguments += ["--additional-config", json.dumps({options.backend: settings})]
    return arguments + options.further


def evaluate(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run lm-eval against a server; the metrics of each task."""
    model = {
        "model": NAME,
        "base_url": f"{url}/v1/completions",
        "tokenizer": options.model.resolve(),
        "tokenizer_backend": "huggingface",
        "num_concurrent": CONCURRENT,
        "max_length": MAX_MODEL_LEN,
    }
    # The tasks name their data relative to the working directory.
    with tempfile.TemporaryDirectory() as folder:
        make_dataset.main(Path(folder, "data"))
        command = [options.lm_eval, "run", "--model", "local-completions"]
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in model.items())]
        command += ["--tasks", ",".join(options.tasks), "--include_path", str(HERE / "tasks")]
        command += ["--output_path", "results", "--log_samples"]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        (path,) = Path(folder, "results").rglob("results_*.json")
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        if options.samples is not None:
            options.samples.mkdir(parents=True, exist_ok=True)
            for task in options.tasks:
                (path,) = Path(folder, "results").rglob(f"samples_{task}_*.jsonl")
                shutil.copy(path, options.samples / f"{task}.jsonl")
    return {
        task: {key.partition(",")[0]: value for key, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results.items()
    }


def serve_and_evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """The whole; returns what is printed.

    Raises:
        ServerError: the server did not start or failed, or there is no lm-eval.
        subprocess.CalledProcessError: lm-eval failed.
        MissingPackageError: a package that the questions are made from is not installed.
    """
    command = shutil.which(options.lm_eval)
    if command is None:
        raise ServerError(f"there is no command {options.lm_eval}; install lm-eval, or name it with --lm-eval")
    options.lm_eval = str(Path(command).absolute())
    log = HERE.parent.parent / "logs" / f"lm-eval-{options.backend}.log"
    with VllmServer(server_arguments(options), log, free_port()) as server:
        server.wait(server.is_healthy, "it answered", STARTUP_SECONDS, Progress("starting"))
        results = evaluate(server.url, options)
        said = server.find(_BYTES)
    held = int(said[1].replace(",", "")) if said else None
    return {"backend": options.backend, "bits": options.bits, "bytes_per_token": held, **results}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options.

    Args:
        arguments: of the command line; None: those of this process.
    """
    own = sys.argv[1:] if arguments is None else arguments
    further = own[own.index("--") + 1 :] if "--" in own else []
    own = own[: len(own) - len(further) - 1] if "--" in own else own
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a checkpoint")
    parser.add_argument("--lm-eval", metavar="COMMAND", default="lm_eval", help="default: lm_eval on the PATH")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help="default: all")
    parser.add_argument("--backend", default="xquant", help="attention backend (default xquant; CPU_ATTN: 16 bit)")
    parser.add_argument("--bits", type=int, help="bits per cached number")
    parser.add_argument("--settings", metavar="JSON", help="further settings of the cache")
    parser.add_argument("--dtype", default="auto", help="as of vllm serve (default auto)")
    parser.add_argument("--samples", metavar="FOLDER", type=Path, help="where lm-eval's record of every answer goes")
    return parser.parse_args(own, argparse.Namespace(further=further))


def main() -> int:
    """Run it; returns the exit status."""
    print(json.dumps(serve_and_evaluate(parse())))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ServerError, MissingPackageError, subprocess.CalledProcessError) as error:
        print(f"lm_eval example: {error}", file=sys.stderr)
        sys.exit(1)
