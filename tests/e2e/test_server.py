"""The product as users meet it: the `vllm serve` command, the OpenAI API, and the errors on the terminal."""

import concurrent.futures
import os
import subprocess
import time
from pathlib import Path

import pytest
from vllm_process import Progress, VllmServer, free_port, vllm_command

from tests.packaging.dashboard import metric_names

pytestmark = pytest.mark.e2e

DOCKER = Path(__file__).resolve().parent.parent.parent / "docker"
ARGUMENTS = ["--served-model-name", "smollm2", "--max-model-len", "1024", "--enforce-eager", "--dtype", "float32"]
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Why is the sky blue?", "Who wrote Hamlet?"]


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    arguments = [
        str(smollm2),
        "--kv-cache-memory-bytes",
        "67108864",
        *ARGUMENTS,
        "--additional-config.xquant.bits",
        "8",
        "--additional-config.xquant.quality_probe=0.05",
    ]
    log = tmp_path_factory.mktemp("server") / "server.log"
    # Started as the images do it; they find `vllm` on the path.
    path = {"PATH": f"{Path(vllm_command()).parent}{os.pathsep}{os.environ['PATH']}"}
    with VllmServer(arguments, log, free_port(), path, program=[str(DOCKER / "serve.sh")]) as server:
        server.wait(server.is_healthy, "it answered", 300, Progress("server"))
        yield server


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)


def ask(client, question: str, **options) -> str:
    messages = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=24, **options)
    return answer.choices[0].message.content


def test_the_images_health_check_passes(server):
    environment = {**os.environ, "PORT": str(server.port)}
    done = subprocess.run([DOCKER / "healthcheck.py"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["200"])


def test_settings_reach_every_process_from_the_command_line(server):
    assert server.find(r'xquant: cache "latent" at key 8 / value 8 bits')


def test_the_kernels_were_built_and_are_used(server):
    assert server.find(r"xquant: attention runs on the C\+\+ kernels")


def test_concurrent_requests_are_answered_as_alone(client):
    alone = [ask(client, question) for question in QUESTIONS]
    with concurrent.futures.ThreadPoolExecutor(len(QUESTIONS)) as pool:
        together = list(pool.map(lambda question: ask(client, question), QUESTIONS))
    assert together == alone
    assert "Paris" in alone[0]


def test_aborted_requests_leave_their_neighbours_and_the_server_alone(client):
    before = ask(client, QUESTIONS[0])
    streams = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question + " Answer at length."}]
        stream = client.chat.completions.create(
            model="smollm2", messages=messages, stream=True, temperature=0, max_tokens=900
        )
        next(iter(stream))
        streams.append(stream)
    for stream in streams:
        stream.close()
    assert ask(client, QUESTIONS[0]) == before
    # The aborted requests' blocks come back to the pool.
    deadline = time.monotonic() + 30
    while _metric(client, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert _metric(client, "vllm:num_requests_running") == 0


def test_the_metrics_of_the_dashboard_are_served(client, server):
    ask(client, QUESTIONS[0])
    text = _metrics(client)
    assert not [name for name in metric_names() if f"\n{name}{{" not in text]
    # 8 bits of 30 layers with 3 kv heads of 64 channels.
    assert _metric(client, "xquant_bytes_per_token") == 30 * 414
    assert _metric(client, "xquant_bytes_per_token_16bit") == 30 * 768
    (said,) = server.find(r"KV cache size: ([\d,]+) tokens").groups()
    assert _metric(client, "xquant_capacity_tokens") == int(said.replace(",", ""))
    assert server.find(
        r"xquant: metrics \(xquant_...\) are written for /metrics; quality probe: compares one of 23 calls"
    )
    before = _metric(client, "xquant_rematerialized_tokens_total")
    ask(client, QUESTIONS[1])
    # Every step reads the prompt and what was answered before; the first reads the prompt alone.
    assert _metric(client, "xquant_rematerialized_tokens_total") - before > 24 * 24
    # Nothing runs, so nothing is attended to; there is no pool.
    assert _metric(client, "xquant_cold_tokens") == _metric(client, "xquant_hot_tokens") == 0


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("key_error", 1e-3, 0.02), ("value_error", 1e-3, 0.02), ("attention_divergence", 0, 0.01)],
)
def test_the_probe_finds_what_8_bits_lose(client, name, least, most):
    total, count = (_metric(client, f"xquant_probe_{name}_{of}") for of in ("sum", "count"))
    assert count > 0
    print(f"{name}: {total / count:.5f}, mean of {count:.0f}")
    assert least < total / count < most


def _metrics(client) -> str:
    import urllib.request

    url = str(client.base_url).removesuffix("v1/") + "metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def _metric(client, name: str) -> float:
    """The sum over all labels."""
    lines = _metrics(client).splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--attention-backend", "xquantt"], ["Unknown attention backend: 'XQUANTT'", "XQUANT"]),
        (
            ["--attention-backend", "xquant", "--kv-cache-dtype", "fp8"],
            ["--kv-cache-dtype fp8 names the format of cached keys and values", "leave it out"],
        ),
    ],
    ids=["unknown backend", "fp8 cache"],
)
def test_errors_come_before_anything_is_loaded(smollm2, arguments, parts):
    command = [vllm_command(), "serve", str(smollm2), "--port", str(free_port()), *ARGUMENTS, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    output = process.stdout + process.stderr
    assert process.returncode != 0
    for part in parts:
        assert part in output
    assert "Starting to load model" not in output
