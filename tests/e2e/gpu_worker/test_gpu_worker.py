"""What a GPU's worker does, on tensors of the CPU: start-up, graphs and their replays, and the tokens that come of it.

See ``worker.py``. The tokens are those of model runner V1, without graphs and by the C++ kernels for CPUs.
"""

import pytest

from tests.e2e.gpu_worker.worker import ENVIRONMENT, START_UP, VARIABLE
from tests.e2e.test_triton import ENGINE, FP32, PROMPT

pytestmark = pytest.mark.e2e

# Kernels seldom round a number to another code; the tokens of these prompts do not hang on it.
GREEDY = {"kind": "greedy", "prompts": [PROMPT[:5], PROMPT], "max_tokens": 4}
# It repeats itself, so that tokens may be drafted.
ECHO = {"kind": "greedy", "prompts": [[9, 10, 11] * 6], "max_tokens": 3}


def check(engines, model, graphs, backend="xquant", task=GREEDY, speculative_config=None, **arguments):
    """Start-up did all that it does on a GPU, graphs hold what they must, and tokens are V1's; returns the replays."""
    settings = {**ENGINE, **arguments}
    expected = engines.run(model, backend, [task], environment=FP32, **settings)
    if speculative_config is not None:
        settings["speculative_config"] = speculative_config
    environment = {**ENVIRONMENT, VARIABLE: str(len(graphs))}
    actual = engines.run(model, backend, [task, {"kind": "gpu_worker"}], environment=environment, **settings)
    assert "attention runs on the Triton kernels" in actual.log
    tokens, report = actual.tasks
    assert report["runner"] == "vllm.v1.worker.gpu.model_runner"
    assert report["steps"] == START_UP
    assert report["graphs"] == graphs
    assert report["faults"] == []
    assert tokens["tokens"] == expected.tasks[0]["tokens"]
    return report["replays"]


def test_latents(engines, tiny):
    assert check(engines, tiny("llama"), [1, 4], xquant={"bits": 4}) > 0


@pytest.mark.nightly
@pytest.mark.parametrize("settings", [{"cache": "x"}, {"method": "xquant-cl"}], ids=["X", "chain"])
def test_inputs(engines, tiny, settings):
    assert check(engines, tiny("llama"), [1, 4], xquant={"bits": 4, **settings}) > 0


@pytest.mark.nightly
@pytest.mark.parametrize("drafts", [1, 5, 40])
def test_drafts(engines, tiny, drafts):
    """Sequences with drafted tokens decode, however many these are, so that graphs hold them."""
    ngrams = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    wide = {"max_model_len": 128, "max_num_batched_tokens": 64, "max_num_seqs": 1}
    check(engines, tiny("llama"), [1 + drafts], task=ECHO, speculative_config=ngrams, xquant={"bits": 4}, **wide)


@pytest.mark.nightly
def test_kivi(engines, tiny):
    assert check(engines, tiny("llama"), [1, 4], "kivi", kivi={}, block_size=128, max_model_len=256) > 0
