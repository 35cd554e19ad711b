"""examples/ray_serve.py on one machine."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_serve
from vllm_process import Progress, VllmServer, free_port

SCRIPT = Path(ray_serve.__file__)
READY = "are compressed, which is all"
REPLICAS = 1


def test_options_become_those_of_vllm():
    bound = ray_serve.app({"model": "M", "replicas": "2", "gpus": "1", "max-model-len": "4096"})
    deployment = bound._bound_deployment
    assert deployment.init_args == (["M", "--max-model-len", "4096", "--attention-backend", "xquant"],)
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options["num_gpus"] == 1


def test_another_backend_may_be_named():
    bound = ray_serve.application(["M", "--attention-backend", "kivi"], replicas=1, gpus=0, cpus=1)
    assert bound._bound_deployment.init_args == (["M", "--attention-backend", "kivi"],)


def test_a_model_must_be_given():
    with pytest.raises(ValueError, match=r"no model was given; say: serve run .* model=MODEL"):
        ray_serve.app({"replicas": "2"})


def _processes(marked: str) -> dict[int, str]:
    """Processes whose variables or command have a word, with their commands."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if marked.encode() in command + (entry / "environ").read_bytes() and int(entry.name) != os.getpid():
                found[int(entry.name)] = command.replace(b"\0", b" ").decode()
    return found


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Where Ray puts its sockets, whose paths must be short; all of its processes name it."""
    folder = Path(tempfile.mkdtemp(prefix="xq-ray-"))
    yield folder
    deadline = time.monotonic() + 60
    while _processes(str(folder)) and time.monotonic() < deadline:
        time.sleep(1)
    left = _processes(str(folder))
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left, "the script left processes behind"


@pytest.fixture(scope="module")
def server(smollm2, ray_folder, tmp_path_factory) -> Iterator[VllmServer]:
    """The script, when it serves."""
    arguments = [str(smollm2), "--replicas", str(REPLICAS), "--served-model-name", "smollm2", "--max-model-len", "512",
                 "--kv-cache-memory-bytes", "67108864", "--enforce-eager", "--dtype", "float32",
                 "--additional-config.xquant.bits", "8"]  # fmt: skip
    variables = {"RAY_TMPDIR": str(ray_folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0",
                 "PYTHONPATH": os.environ.get("PYTHONPATH", str(SCRIPT.parent.parent))}  # fmt: skip
    variables["RAY_ADDRESS"] = ""
    log = tmp_path_factory.mktemp("ray") / "serve.log"
    program = [sys.executable, str(SCRIPT)]
    with VllmServer(arguments, log, free_port(), variables, program=program) as server:
        ready = lambda: server.is_healthy() and server.log_text().count(READY) == REPLICAS  # noqa: E731
        server.wait(ready, "its replicas were ready", 600, Progress("Ray Serve"))
        yield server
        # Ray ends its processes in order, which takes longer than vLLM alone.
        server.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(120)


def _ask(server: VllmServer) -> str:
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": "smollm2", "messages": [question], "temperature": 0, "max_tokens": 16}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


@pytest.mark.e2e
@pytest.mark.nightly
def test_it_answers_over_http(server):
    answers = {_ask(server) for _ in range(6)}
    assert len(answers) == 1
    assert "Paris" in answers.pop()
    assert server.find(r"xquant: attention runs on the C\+\+ kernels")


@pytest.mark.e2e
@pytest.mark.nightly
def test_answers_are_streamed(server):
    body = {"model": "smollm2", "prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 5


@pytest.mark.e2e
@pytest.mark.nightly
def test_a_replica_whose_engine_dies_is_replaced(server, ray_folder):
    engines = [pid for pid, command in _processes(str(ray_folder)).items() if "EngineCore" in command]
    assert len(engines) == REPLICAS
    os.kill(engines[0], signal.SIGKILL)
    replaced = lambda: server.log_text().count(READY) == REPLICAS + 1  # noqa: E731
    server.wait(replaced, "the replica was replaced", 900, Progress("Ray Serve"))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError):
            if all("Paris" in _ask(server) for _ in range(4)):
                return
        time.sleep(2)
    raise AssertionError("the server does not answer as before")
