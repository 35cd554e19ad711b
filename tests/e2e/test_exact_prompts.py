"""``prompt: "exact"`` in a real engine: a prompt of one step is the 16-bit one, and what it answers reads the cache."""

import pytest

from tests.e2e.engine_process import NUM_LOGITS
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.e2e

PROMPT = [(7 * i * i + 3 * i + 5) % 300 + 3 for i in range(200)]
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
NEXT = {"kind": "next_logits", "prompts": [PROMPT], "max_tokens": 2}
CASES = {
    "latents, biases": ("llama-bias", {}),
    "latents, windows and norms": ("gemma3", {}),
    "latents, windows and sinks": ("gpt-oss", {}),
    "X": ("mha", {"cache": "x"}),
    "chain of X": ("mha", {"method": "xquant-cl", "first_layers": 1}),
    "chain of latents": ("llama", {"method": "xquant-cl"}),
}


def difference(ours, expected):
    return max(abs(a - b) for a, b in zip(ours, expected, strict=True))


def step_difference(ours, expected):
    return max(abs(ours[token] - expected[token]) for token in ours.keys() & expected.keys())


@pytest.mark.alike(keep=2)
@pytest.mark.parametrize("name", CASES)
def test_a_prompt_of_one_step_is_attended_exactly(engines, tmp_path, name):
    family, settings = CASES[name]
    model = save_tiny_model(tmp_path, family)

    def serve(backend, tasks, **more):
        return engines.run(model, backend, tasks, **{**ENGINE, **more}).tasks

    exact_settings = {**settings, "bits": 2, "prompt": "exact"}
    expected, steps = serve("CPU_ATTN", [LOGPROBS, NEXT])
    exact, exact_steps = serve("xquant", [LOGPROBS, NEXT], xquant=exact_settings, enable_prefix_caching=False)
    (cut,) = serve("xquant", [LOGPROBS], xquant=exact_settings, enable_prefix_caching=False, max_num_batched_tokens=72)
    error, cut_error = (difference(of["logprobs"][0], expected["logprobs"][0]) for of in (exact, cut))
    first, second = (
        step_difference(ours, other) for ours, other in zip(exact_steps["logits"][0], steps["logits"][0], strict=True)
    )
    print(
        f"largest change of a logit: {error:.1e} in one step, {cut_error:.1e} in three; {first:.1e}, then {second:.1e}"
    )
    assert error < 1e-3
    assert first < 1e-3
    # Tokens of earlier steps are read from the cache, of 2 bits.
    assert cut_error > 0.02
    assert second > 0.02
