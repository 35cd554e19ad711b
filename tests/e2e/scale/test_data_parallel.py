"""Two engines of data parallelism: behind one server, and as processes that load a model of experts together."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm_process import Progress, VllmServer, free_port

from tests.e2e import engine
from tests.e2e.families.test_families import ENGINE
from tests.e2e.scale.conftest import GREEDY, tokens

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

# With a pool of hot blocks, by default.
X = {"bits": 8, "cache": "x"}


def options(arguments):
    """Arguments of an engine as ``vllm serve`` has them."""
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        yield from (option,) if value is True else (option, str(value))


def complete(url, prompt, rank=None):
    """A greedy continuation, by the engine of a rank or by one that the server chooses."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": GREEDY["max_tokens"], "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    headers = {"Content-Type": "application/json"} | ({} if rank is None else {"X-data-parallel-rank": str(rank)})
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["choices"][0]["token_ids"]


def test_two_engines_behind_one_server(ranks, tmp_path):
    """Dense models: engines know nothing of each other. They factorize the same layers at once, into one cache."""
    one = ranks.one("mha", xquant=X)
    arguments = {
        **ENGINE,
        "enforce_eager": True,
        "served_model_name": "tiny",
        "attention_backend": "xquant",
        "additional_config": json.dumps({"xquant": X}),
        "data_parallel_size": 2,
        "api_server_count": 1,
    }
    environment = {**ranks.cores, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [str(ranks.model("mha")), *options(arguments)]
    with VllmServer(command, tmp_path / "log", free_port(), environment) as server:
        server.wait(server.is_healthy, "it answered", 180, Progress("server"))
        for rank in (0, 1):
            assert [complete(server.url, prompt, rank) for prompt in GREEDY["prompts"]] == tokens(one)
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda prompt: complete(server.url, prompt), GREEDY["prompts"] * 4))
        assert answers == tokens(one) * 4
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        log = server.log_text()
    served = re.findall(r'vllm:request_success_total\{engine="(\d)".*length.*\} (\d+)', metrics)
    assert sum(int(float(count)) for _, count in served) == 18
    # Both have counted what they read, and that it came from their pools.
    counted = re.findall(r'xquant_rematerialized_tokens_total\{engine="(\d)".*rank="0"\} (\S+)', metrics)
    assert [engine for engine, count in counted if float(count) > 0] == ["0", "1"]
    # Both engines have all of the memory that was named, and say so.
    assert re.findall(r"KV cache size: ([\d,]+) tokens", log) == [f"{one.capacity:,}"] * 2
    assert log.count("keep the keys and values of up to") == 2
    assert "are computed anew" not in log


def test_two_processes_that_share_the_experts_out(ranks, tmp_path):
    """Offline, with variables for the ranks, which vLLM has for such models alone."""
    settings = {"bits": 8, "cache": "latent"}
    arguments = {"attention_backend": "xquant", "additional_config": {"xquant": settings}}
    answers = share_experts(ranks, arguments, tmp_path / "xquant")
    if isinstance(answers, str):
        # Experts of some processors' kernels exchange tokens by an operation that vLLM has for GPUs alone.
        plain = share_experts(ranks, {"attention_backend": "CPU_ATTN"}, tmp_path / "16bit")
        assert isinstance(plain, str), f"16 bit is served, but: {answers[-4000:]}"
        assert "in all_gatherv" in answers, answers[-4000:]
        assert "in all_gatherv" in plain, plain[-4000:]
        pytest.skip("on this processor vLLM itself cannot share experts out: its CPU communicator has no all_gatherv")
    one = ranks.one("gpt-oss", xquant=settings)
    for answer in answers:
        assert answer["tasks"][0]["tokens"] == tokens(one)
        assert answer["cache_tokens"] == one.cache_tokens


def share_experts(ranks, arguments, folder):
    """What both processes answer, or the log of the first that failed."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = {**engine.DEFAULTS, **ENGINE, "model": str(ranks.model("gpt-oss")), **arguments}
    processes = []
    for rank in (0, 1):
        (folder / f"{rank}.json").write_text(json.dumps({"engine": arguments, "tasks": [GREEDY]}))
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_RANK_LOCAL": str(rank),
            "VLLM_DP_SIZE": "2",
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
        }
        script = [sys.executable, str(engine._SCRIPT), str(folder / f"{rank}.json"), str(folder / f"{rank}.result")]
        with (folder / f"{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(script, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(processes):
            if process.wait(200):
                return (folder / f"{rank}.log").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.result").read_text()) for rank in (0, 1)]
