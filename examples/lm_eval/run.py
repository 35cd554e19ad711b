"""Serve a checkpoint with vLLM, run lm-eval on it over HTTP, and stop the server.

lm-eval may live in an environment of its own (pip install "lm-eval[api]" transformers):

    python examples/lm_eval/run.py models/smollm2-135m-instruct --lm-eval ~/lm-eval/bin/lm_eval --bits 4
    python examples/lm_eval/run.py models/smollm2-135m-instruct --lm-eval ~/lm-eval/bin/lm_eval --backend CPU_ATTN

The last line on stdout is a JSON object with the metrics of each task.
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
sys.path.insert(0, str(HERE.parent))

import make_dataset  # noqa: E402
from vllm_process import Progress, ServerError, VllmServer, free_port  # noqa: E402

TASKS = ("xquant_continuation", "xquant_pages")
NAME = "evaluated"
STARTUP_SECONDS = 600
MAX_MODEL_LEN = 2048


def server_arguments(options: argparse.Namespace) -> list[str]:
    """What the server is started with."""
    arguments = [str(options.model), "--attention-backend", options.backend, "--served-model-name", NAME]
    arguments += ["--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", str(256 << 20)]
    arguments += ["--dtype", options.dtype, "--enforce-eager"]
    settings = {} if options.settings is None else json.loads(options.settings)
    if options.bits is not None:
        settings["bits"] = options.bits
    if settings:
        arguments += ["--additional-config", json.dumps({"xquant": settings})]
    return arguments


def evaluate(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run lm-eval against a server; the metrics of each task."""
    model = {
        "model": NAME,
        "base_url": f"{url}/v1/completions",
        "tokenizer": options.model.resolve(),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 2,
        "max_length": MAX_MODEL_LEN,
    }
    # The tasks name their data relative to the working directory.
    with tempfile.TemporaryDirectory() as folder:
        make_dataset.main(Path(folder, "data"))
        command = [options.lm_eval, "run", "--model", "local-completions"]
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in model.items())]
        command += ["--tasks", ",".join(TASKS), "--include_path", str(HERE / "tasks"), "--output_path", "results"]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        (path,) = Path(folder, "results").rglob("results_*.json")
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {
        task: {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results.items()
    }


def main() -> int:
    """Run the whole; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a checkpoint")
    parser.add_argument("--lm-eval", metavar="COMMAND", default="lm_eval", help="default: lm_eval on the PATH")
    parser.add_argument("--backend", default="xquant", help="attention backend (default xquant; CPU_ATTN: 16 bit)")
    parser.add_argument("--bits", type=int, help="bits per cached number")
    parser.add_argument("--settings", metavar="JSON", help="further settings of the cache")
    parser.add_argument("--dtype", default="auto", help="as of vllm serve (default auto)")
    options = parser.parse_args()
    command = shutil.which(options.lm_eval)
    if command is None:
        raise ServerError(f"there is no command {options.lm_eval}; install lm-eval, or name it with --lm-eval")
    options.lm_eval = str(Path(command).absolute())
    log = HERE.parent.parent / "logs" / f"lm-eval-{options.backend}.log"
    with VllmServer(server_arguments(options), log, free_port()) as server:
        server.wait(server.is_healthy, "it answered", STARTUP_SECONDS, Progress("starting"))
        results = evaluate(server.url, options)
    print(json.dumps({"backend": options.backend, "bits": options.bits, **results}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ServerError, subprocess.CalledProcessError) as error:
        print(f"lm_eval example: {error}", file=sys.stderr)
        sys.exit(1)
