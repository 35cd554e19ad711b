"""Below 4 bits a server calibrates at its first start, without being asked to, and serves the result."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from vllm_process import Progress, VllmServer, free_port, vllm_command

from tests.e2e.families.test_families import ENGINE, TASKS
from tests.e2e.offline.test_factorize import perplexity
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer

pytestmark = pytest.mark.e2e

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_tokenizer(save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "llama"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 31)
    return path


def test_one_command_calibrates_and_serves(tiny, text, tmp_path):
    """From a folder that is not the repository's; Ctrl-C reaches the server, which ends as it always does."""
    options = ["--max-model-len", "512", "--kv-cache-memory-bytes", "16777216", "--enforce-eager"]
    command = [str(tiny), "--bits", "2", "--calibration", str(text), "--served-model-name", "tiny", *options]
    log = tmp_path / "log"
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    program = [str(Path(vllm_command()).with_name("python")), "-m", "xquant_vllm.cli", "serve"]
    with VllmServer(command, log, free_port(), environment, program=program) as server:
        server.wait(server.is_healthy, "it answered", 300, Progress("server"))
        said = log.read_text()
        assert complete(server.url)
    steps = ["step 1 of 3, plan", "step 2 of 3, factors", "step 3 of 3, serve: vllm serve"]
    served = [
        "xquant: calibrating",
        "calibrate: sequence 4 of 4 done",
        "xquant: calibrated: factors in",
        "(calibrated on 2048 tokens)",
    ]
    places = [said.index(line) for line in (*steps, *served)]
    assert places == sorted(places)
    # The weights were loaded when the other process, and its memory, were gone.
    assert said.index("xquant: calibrated: ") < said.index("Loading safetensors")


def complete(url):
    body = json.dumps({"model": "tiny", "prompt": "The dog", "max_tokens": 4, "temperature": 0}).encode()
    asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.loads(answer.read())["usage"]["completion_tokens"] == 4


@pytest.mark.nightly
def test_two_bits_lose_little_by_themselves(engines, smollm2, documentation):
    tasks = [{"kind": "prompt_logprobs", "prompts": [documentation[:900]]}]
    found = {}
    for calibration in ("none", "auto", "auto"):
        settings = {"bits": 2, "calibration": calibration, "prompt": "cached"}
        # The third engine is another one, which finds what the second has kept.
        seed = len(found)
        result = engines.run(smollm2, "xquant", tasks, xquant=settings, dtype="bfloat16", seed=seed)
        found[calibration] = perplexity(result.tasks[0]["logprobs"][0])
        said = result.log
        assert ("xquant: calibrated before" in said) == (seed == 2)
        assert ("xquant: calibrated: factors in" in said) == (seed == 1)
    print(f"perplexity at 2 bits: {found}")
    assert found["auto"] < 0.6 * found["none"]


@pytest.mark.nightly
def test_tensor_parallel_ranks_share_one_calibration(engines, tiny, text):
    cores = sorted(os.sched_getaffinity(0))[:2]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    # Latents, which the input of a tiny model is narrower than.
    settings = {"bits": 8, "basis": "head", "calibration": str(text)}
    engine = {**ENGINE, "dtype": "float32"}
    ours = engines.run(tiny, "xquant", TASKS, xquant=settings, environment=binding, tensor_parallel_size=2, **engine)
    assert ours.log.count("xquant: calibrated: factors in") == 1
    assert ours.log.count("factors read from") == 1  # the first rank speaks
    alone = engines.run(tiny, "xquant", TASKS, xquant=settings, **engine)
    assert "xquant: calibrated before" in alone.log
    assert ours.tasks[0]["tokens"] == alone.tasks[0]["tokens"]


@pytest.mark.nightly
def test_a_killed_start_leaves_nothing_running_and_the_next_goes_on(smollm2, tmp_path):
    """Killed while the model runs over the text, which takes some seconds per sequence."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"EngineArgs(model={str(smollm2)!r}, attention_backend='xquant', additional_config={{'xquant': {{'bits': 2}}}})"
        ".create_engine_config()"
    )
    command = [sys.executable, "-c", code]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    work = tmp_path / "cache" / "xquant_vllm" / "calibrated"
    for _ in range(6000):
        if list(work.glob(".*.work/samples-cpu/sequence-0.safetensors")):
            break
        first.poll() is None or pytest.fail(first.stdout.read())
        time.sleep(0.05)
    first.kill()
    first.communicate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    # The process of the first start has ended, too: it would still hold the lock.
    assert "another process is calibrating" not in said
    assert "taken from" in said
    assert "xquant: calibrated: factors in" in said
