"""Adapters (LoRA) that come and go while `vllm serve` runs."""

import json
import shutil
import urllib.error
import urllib.request

import pytest
from vllm_process import Progress, VllmServer, free_port

from tests.e2e.families.test_families import ENGINE, PROMPT, assert_close, difference
from tests.e2e.features.checkpoints import merge, save_adapter
from tests.e2e.features.test_adapters import FREE, LOGPROBS

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

ARGUMENTS = ["--served-model-name", "base", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
ARGUMENTS += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--attention-backend", "xquant"]
ARGUMENTS += ["--kv-cache-memory-bytes", "67108864", "--additional-config.xquant.bits", "8"]


@pytest.fixture(scope="module")
def folder(tiny, smollm2, tmp_path_factory):
    """A tiny model with a tokenizer, which the server wants to have."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny("mha"), folder)
    for path in smollm2.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with VllmServer([str(folder), *ARGUMENTS], log, free_port(), environment) as server:
        server.wait(server.is_healthy, "it answered", 300, Progress("server"))
        yield server


def post(server, path, **content):
    """Status and content of an answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/{path}", json.dumps(content).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def load(server, folder, name=None, **how):
    return post(server, "load_lora_adapter", lora_name=name or folder.name, lora_path=str(folder), **how)


def logprobs(server, model):
    """Log-probability of every token of the prompt but the first, or the status of a refusal."""
    status, content = post(server, "completions", model=model, prompt=PROMPT, max_tokens=1, prompt_logprobs=0)
    if status != 200:
        return status
    entries = json.loads(content)["choices"][0]["prompt_logprobs"]
    return [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], PROMPT[1:], strict=True)]


def test_adapters_come_and_go_while_the_server_runs(engines, server, folder, tmp_path):
    good = save_adapter(tmp_path / "good", folder, FREE)
    keys = save_adapter(tmp_path / "keys", folder, ("q_proj", "k_proj"))
    values = save_adapter(tmp_path / "values", folder, ("layers.1.self_attn.v_proj",))
    torn = save_adapter(tmp_path / "torn", folder, FREE)
    (torn / "adapter_model.safetensors").write_bytes(b"no tensors")
    base = logprobs(server, "base")

    assert load(server, good) == (200, "Success: LoRA adapter 'good' added successfully.")
    served = logprobs(server, "good")
    merged = engines.run(merge(folder, good, tmp_path / "merged"), "CPU_ATTN", [LOGPROBS], **ENGINE).tasks[0]
    assert_close(served, merged["logprobs"][0], 0.03)
    assert difference(served, base) > 0.1

    for refused, changed in ((keys, "layers.0.self_attn.k_proj"), (values, "layers.1.self_attn.v_proj")):
        # Also in place of one that is served, which stays.
        for how in ({}, {"name": "good", "load_inplace": True}):
            status, content = load(server, refused, **how)
            message = json.loads(content)["error"]["message"]
            assert status >= 400
            # Where it lies is left out by vLLM.
            assert f"xquant: the adapter '{how.get('name', refused.name)}' (" in message
            assert f") changes model.{changed}" in message
            assert "merge it into the checkpoint, or train one without keys and values" in message
            assert "\n" not in message
    for wrong in (torn, tmp_path / "nowhere"):
        status, content = load(server, wrong)
        assert status >= 400
        assert json.loads(content)["error"]["message"]
    for name in ("keys", "values", "torn", "nowhere"):
        assert logprobs(server, name) == 404

    assert logprobs(server, "good") == served
    assert logprobs(server, "base") == base
    assert post(server, "unload_lora_adapter", lora_name="good")[0] == 200
    assert post(server, "unload_lora_adapter", lora_name="good")[0] == 404
    assert logprobs(server, "good") == 404
    assert load(server, good)[0] == 200
    assert logprobs(server, "good") == served
    assert logprobs(server, "base") == base
