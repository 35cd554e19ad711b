"""KIVI through a real engine: against the offline baseline, and however vLLM schedules it."""

import statistics

import pytest
import torch

from tests.e2e.engine_process import NUM_LOGITS
from xquant_vllm.evaluation.methods.baselines.kivi import Kivi
from xquant_vllm.evaluation.model.cache_method import CacheMethod
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.checkpoint import open_checkpoint

pytestmark = pytest.mark.e2e

PROMPT = [(7 * i * i + 3 * i + 5) % 300 + 3 for i in range(200)]
RESIDUAL = 64
CACHED = {"bits": 2, "residual": RESIDUAL, "prompt": "cached"}
ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 8,
    "max_logprobs": NUM_LOGITS,
    "logprobs_mode": "raw_logits",
}
LOGPROBS = {"kind": "prompt_logprobs", "prompts": [PROMPT]}
NEXT = {"kind": "next_logits", "prompts": [PROMPT], "max_tokens": 3}


@pytest.fixture(scope="module")
def serve(engines, tiny):
    def serve(family, kivi, tasks, **settings):
        return engines.run(tiny(family), "kivi", tasks, kivi=kivi, **{**ENGINE, **settings})

    return serve


def offline(folder, method) -> list[float]:
    """Logits of the prompt's tokens, each by the ones before."""
    hooked = HookedModel(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))
    logits = hooked.logits(torch.tensor(PROMPT), method)[:-1]
    return logits.gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).flatten().tolist()


def difference(ours, expected):
    return statistics.mean(abs(p - q) for p, q in zip(ours, expected, strict=True))


def step_difference(ours, expected):
    """Largest difference of logits that both list."""
    return max(abs(a[token] - b[token]) for a, b in zip(ours, expected, strict=True) for token in a.keys() & b.keys())


@pytest.mark.alike(keep=1)
# Windows shorter than the residual, some layers with and some without, key norms.
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
def test_serving_reads_what_the_baseline_reads_however_prompts_are_cut(serve, tiny, family):
    cold, warm, logprobs = serve(family, CACHED, [NEXT, NEXT, LOGPROBS], max_num_batched_tokens=72).tasks
    ours = logprobs["logprobs"][0]
    error = difference(ours, offline(tiny(family), Kivi(CACHED["bits"], 32, RESIDUAL)))
    loss = difference(ours, offline(tiny(family), CacheMethod()))
    print(f"mean absolute difference of a logit {error:.2e}; the cache itself changes it by {loss:.2e}")
    # A sum in another order now and then makes another code.
    assert error < 0.01 * loss
    assert cold["cached"] == [0]
    assert warm["cached"][0] >= 128
    assert step_difference(warm["logits"][0], cold["logits"][0]) < 0.05 * loss


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize(("family", "pre_rope"), [("llama", False), ("llama", True), ("gemma3", True)])
def test_a_prompt_of_one_step_is_attended_exactly(serve, tiny, family, pre_rope):
    """With ``pre_rope`` that also means that keys are rotated as the model would have."""
    kivi = {"residual": 64, "group_size": 64, "pre_rope": pre_rope}
    (logprobs,) = serve(family, kivi, [LOGPROBS], enable_prefix_caching=False).tasks
    assert difference(logprobs["logprobs"][0], offline(tiny(family), CacheMethod())) < 1e-4


def test_keys_before_rope_lose_about_what_keys_after_it_lose(serve, tiny):
    """Rotated by a wrong position, or not at all, they would lose many times as much."""
    kivi = {**CACHED, "bits": 4, "group_size": 32, "pre_rope": True}
    (logprobs,) = serve("llama", kivi, [LOGPROBS]).tasks
    exact = offline(tiny("llama"), CacheMethod())
    before = difference(logprobs["logprobs"][0], exact)
    after = difference(offline(tiny("llama"), Kivi(4, 32, RESIDUAL)), exact)
    print(f"mean absolute change of a logit: keys before RoPE {before:.2e}, after it {after:.2e}")
    assert before < 2 * after


def test_preempted_and_resumed_equals_undisturbed(serve):
    prompts = [PROMPT[start : start + 20] for start in range(0, 80, 10)]
    tasks = [{"kind": "greedy", "prompts": prompts, "max_tokens": 120}, {"kind": "preemptions"}]
    settings = {"disable_log_stats": False, "max_num_batched_tokens": 128}
    roomy = serve("llama", CACHED, tasks, **settings).tasks
    # 8 sequences begin with a block of codes and two of the residual, and come to two and up to five.
    tight = serve("llama", CACHED, tasks, num_gpu_blocks_override=30, **settings).tasks
    assert roomy[1]["count"] == 0
    assert tight[1]["count"] > 0
    same = sum(a == b for a, b in zip(tight[0]["tokens"], roomy[0]["tokens"], strict=True))
    print(f"{tight[1]['count']} preemptions; {same} of {len(prompts)} continuations are identical")
    assert same >= len(prompts) - 1
