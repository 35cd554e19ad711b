"""vLLM's own benchmark client, sending a trace to a server."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.serving.trace import Trace
from examples.vllm_process import ServerError, vllm_command

_PERCENTILES = "50,90,99"
_KEPT = ("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
         "output_throughput", "total_token_throughput")  # fmt: skip


def send(trace: Trace, url: str, model: str, log: Path) -> dict[str, Any]:
    """Send all requests and wait for the answers.

    Returns:
        Throughputs, and of TTFT, TPOT, ITL and end-to-end latency the mean and percentiles in milliseconds.

    Raises:
        ServerError: the client failed, or a request was not answered.
    """
    with tempfile.TemporaryDirectory() as folder:
        dataset, result = Path(folder, "trace.jsonl"), Path(folder, "result.json")
        trace.write(dataset)
        command = [
            vllm_command(), "bench", "serve", "--backend", "openai", "--base-url", url, "--model", model,
            "--dataset-name", "custom", "--dataset-path", str(dataset), "--disable-shuffle", "--skip-chat-template",
            "--custom-output-len", "-1", "--num-prompts", str(len(trace.prompts)), "--ignore-eos",
            "--temperature", "0", "--seed", str(trace.seed), "--disable-tqdm",
            "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", _PERCENTILES,
            "--save-result", "--result-dir", folder, "--result-filename", result.name,
        ]  # fmt: skip
        if trace.concurrency is not None:
            command += ["--max-concurrency", str(trace.concurrency)]
        command += ["--request-rate", "inf" if trace.rate is None else str(trace.rate)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("a") as output:
            code = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False).returncode
        if code or not result.is_file():
            raise ServerError(f"vllm bench serve ended with exit code {code}; its log is {log}")
        answer = json.loads(result.read_text())
    if answer["completed"] != len(trace.prompts):
        raise ServerError(f"{answer['completed']} of {len(trace.prompts)} requests were answered; the log is {log}")
    latencies = {
        name: value for name, value in answer.items() if name.endswith("_ms") and not name.startswith(("std", "median"))
    }
    return {name: answer[name] for name in _KEPT if name in answer} | latencies
