"""Two machines without Ray, played by two servers on this one: what each of them is told need not be the same."""

import json
import time

import pytest
from vllm_process import Progress, VllmServer, free_port

from tests.e2e.families.test_families import ENGINE
from tests.e2e.scale.conftest import GREEDY, tokens
from tests.e2e.scale.test_data_parallel import complete, options

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]


@pytest.fixture
def nodes(ranks, tmp_path):
    """Servers of both nodes, the second without a port of its own, for settings of each."""
    started = []

    def start(*settings):
        port = free_port()
        for number, xquant in enumerate(settings):
            arguments = {
                **ENGINE,
                "enforce_eager": True,
                "served_model_name": "tiny",
                "attention_backend": "xquant",
                "additional_config": json.dumps({"xquant": xquant}),
                "tensor_parallel_size": 2,
                "nnodes": 2,
                "node_rank": number,
                "master_addr": "127.0.0.1",
                "master_port": port,
            } | ({"headless": True} if number else {})
            core = ranks.cores["VLLM_CPU_OMP_THREADS_BIND"].split("|")[number]
            environment = {"VLLM_CPU_OMP_THREADS_BIND": core, "XDG_CACHE_HOME": str(tmp_path / "cache")}
            command = [str(ranks.model("mha")), *options(arguments)]
            started.append(VllmServer(command, tmp_path / f"log{number}", free_port(), environment))
        return started

    yield start
    for server in reversed(started):
        server.stop()


def test_two_nodes_answer_like_one_rank(ranks, nodes):
    settings = {"bits": 8, "cache": "x"}
    first, _ = nodes(settings, settings)
    first.wait(first.is_healthy, "it answered", 180, Progress("server"))
    assert [complete(first.url, prompt) for prompt in GREEDY["prompts"]] == tokens(ranks.one("mha", xquant=settings))


def test_nodes_with_other_settings_stop_each_other(nodes):
    """Their pages would have other bytes, and vLLM asks only how many of them there are."""
    servers = nodes({"bits": 8}, {"bits": 4})
    said = r"xquant: rank 1 on \S+ runs with xquant=\{'bits': 4\}, rank 0 on \S+ with xquant=\{'bits': 8\}; give every"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not all(server.find(said) for server in servers):
        time.sleep(1)
    for server in servers:
        assert server.find(said), server.tail()
