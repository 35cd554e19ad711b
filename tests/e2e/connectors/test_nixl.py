"""Prefill and decode in servers of their own: one reads the pages of the other out of its memory, over NIXL on CPUs.

They need the package nixl, which is not installed with the tests: `pip install nixl`.
"""

import importlib.util
import json
import re
import urllib.error
import urllib.request

import pytest
from safetensors.torch import load_file, save_file
from vllm_process import Progress, VllmServer, free_port

from tests.e2e.connectors.test_exchange import CHAIN, LATENT
from tests.e2e.families.test_families import ENGINE, PROMPT
from tests.e2e.scale.test_data_parallel import options
from tests.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.nightly,
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="the package nixl is not installed"),
]

# Six blocks of 32 and a token: who reads them computes that token alone, like an engine whose prefix cache has them.
WHOLE = PROMPT[:193]
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None}
PREFILL |= {"remote_host": None, "remote_port": None}
CASES = {
    "latents": ("llama", LATENT, {}),
    "X, hot": ("mha", {"bits": 4, "cache": "x"}, {}),
    "chain of X": ("mha", {**CHAIN, "cache": "x", "hot": 0}, {}),
    "windows": ("gemma3", LATENT, {}),
}


class Pair:
    """A server that computes prompts, and others that go on from its pages."""

    def __init__(self, folder):
        self._folder = folder
        self.servers = []
        # Tokens whose pages were asked for without an answer.
        self.in_vain = 0

    def start(self, model, role, xquant, **settings):
        """One of them; not awaited."""
        arguments = {
            **ENGINE,
            "enforce_eager": True,
            "served_model_name": "tiny",
            "attention_backend": "xquant",
            "additional_config": json.dumps({"xquant": {"calibration": "none", **xquant}}),
            "kv_transfer_config": json.dumps({"kv_connector": "NixlConnector", "kv_role": role}),
            **settings,
        }
        environment = {
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            # Of the ways that UCX may find on a machine, those that every one has.
            "UCX_TLS": "tcp,shm,self",
            "XDG_CACHE_HOME": str(self._folder / "cache"),
        }
        log = self._folder / f"{role}-{len(self.servers)}.log"
        server = VllmServer([str(model), *options(arguments)], log, free_port(), environment)
        self.servers.append(server)
        return server

    def await_all(self):
        for server in self.servers:
            server.wait(server.is_healthy, "it answered", 300, Progress(server.log.stem))

    @staticmethod
    def ask(server, prompt, transfer=None, max_tokens=8):
        """Tokens, their log-probabilities, and where a prefilled prompt is."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 5}
        body |= {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
        body |= {"kv_transfer_params": transfer}
        request = urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer = json.loads(answer.read())
        choice = answer["choices"][0]
        return (choice["token_ids"], choice["logprobs"]["top_logprobs"]), answer["kv_transfer_params"]

    def go_on(self, prefill, decode, prompt):
        """What the second server answers for a prompt that the first one computes."""
        for attempt in range(5):
            _, transfer = self.ask(prefill, prompt, PREFILL, 1)
            before = self.tokens_read(decode)
            try:
                return self.ask(decode, prompt, transfer)[0]
            except urllib.error.HTTPError as error:
                # vLLM waits 5 s for the other engine's answer, which may come later on a machine that is busy.
                if error.code != 500 or attempt == 4 or not decode.find("zmq.error.Again"):
                    raise
                self.in_vain += self.tokens_read(decode) - before
        raise AssertionError

    @staticmethod
    def tokens_read(server):
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
            found = re.search(r"^vllm:external_prefix_cache_hits_total\{.*\} (\S+)$", answer.read().decode(), re.M)
        return float(found.group(1))


@pytest.fixture
def pair(tmp_path):
    pair = Pair(tmp_path)
    yield pair
    for server in pair.servers:
        server.stop()


@pytest.mark.parametrize("name", CASES)
def test_decode_goes_on_as_prefill_does_from_its_own_cache(pair, tiny, name):
    family, xquant, settings = CASES[name]
    prefill, decode = (pair.start(tiny(family), role, xquant, **settings) for role in ("kv_producer", "kv_consumer"))
    pair.await_all()
    found = pair.go_on(prefill, decode, WHOLE)
    # To the last bit: the same bytes are attended to.
    assert found == pair.ask(prefill, WHOLE)[0]
    # A prompt that ends within a block, whose page is read, too; the token after it goes into that page.
    found = pair.go_on(prefill, decode, PROMPT[50:170])
    assert found[0] == pair.ask(prefill, PROMPT[50:170])[0][0]
    assert pair.tokens_read(decode) - pair.in_vain == 193 + 120


def test_engines_with_other_factors_refuse_each_other(pair, tmp_path):
    """Under the name of the same model, which is all that vLLM compares."""
    model = save_tiny_model(tmp_path / "model", "llama")
    prefill = pair.start(model, "kv_producer", LATENT)
    pair.await_all()
    own, transfer = pair.ask(prefill, WHOLE, PREFILL)
    recomputes = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer", "kv_load_failure_policy": "recompute"}
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] *= 1 + 2**-10
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    other_weights = pair.start(model, "kv_consumer", LATENT)
    other_bits = pair.start(model, "kv_consumer", {**LATENT, "bits": 3}, kv_transfer_config=json.dumps(recomputes))
    pair.await_all()
    refused = r"ERROR .*xquant: no pages are read from the engine at 127\.0\.0\.1:\d+, which has other: "
    # vLLM ends the request, unless it is told to compute its prompt.
    for _ in range(5):
        with pytest.raises(OSError, match="500"):
            pair.ask(other_weights, WHOLE, transfer)
        if not other_weights.find("zmq.error.Again") or other_weights.find(refused):
            break
    assert other_weights.find(refused + "factors, weights; start both"), other_weights.tail()
    computed = pair.ask(other_bits, WHOLE, transfer)[0]
    assert other_bits.find(refused + "factors, pages, settings, weights; start both"), other_bits.tail()
    assert computed != own
    assert computed == pair.ask(other_bits, [*WHOLE])[0]
    assert prefill.is_healthy()
