"""The real Gemma 3 270M: sliding and full layers, query and key norms, one kv head of 256 channels."""

import pydoc_data.topics
import statistics

import pytest
import transformers
from model_prep.gemma3 import LONG_TEXT

from tests.family_coverage import LATENTS

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def tokenizer(gemma3):
    return transformers.AutoTokenizer.from_pretrained(gemma3)


@pytest.fixture(scope="module")
def run(engines, gemma3, tokenizer):
    """Continuations of a text longer than the window, cold and from the prefix cache, and logprobs of prose."""
    recall = tokenizer.encode(LONG_TEXT)
    week = tokenizer.encode("The days of the week are Monday, Tuesday,")
    prose = tokenizer.encode(pydoc_data.topics.topics["assignment"])[:700]
    assert len(recall) > 576
    tasks = [
        {"kind": "greedy", "prompts": [recall, week], "max_tokens": 2},
        {"kind": "greedy", "prompts": [recall, week], "max_tokens": 2},
        {"kind": "prompt_logprobs", "prompts": [prose]},
    ]

    def run(backend, bits=None):
        xquant = None if bits is None else {"bits": bits}
        return engines.run(gemma3, backend, tasks, xquant=xquant, dtype="bfloat16", block_size=64)

    return run


@pytest.mark.parametrize(
    "bits", [pytest.param(4, marks=pytest.mark.covers("Gemma 3", "prefix caching", "bits=4", *LATENTS)), 8]
)
def test_answers_are_right_past_the_sliding_window_and_from_the_prefix_cache(run, tokenizer, bits):
    cold, warm, _ = run("xquant", bits).tasks
    assert cold["cached"] == [0, 0]
    # More than the window of 512: its layers have let go of the first blocks.
    assert warm["cached"][0] >= 576
    for answers in (cold, warm):
        recalled, weekday = (tokenizer.decode(tokens) for tokens in answers["tokens"])
        assert recalled.startswith(" banana")
        assert weekday.startswith(" Wednesday")


def test_log_probabilities_are_those_of_the_16_bit_cache(run):
    expected = run("CPU_ATTN").tasks[2]["logprobs"][0]
    changes = []
    for bits in (8, 4):
        ours = run("xquant", bits).tasks[2]["logprobs"][0]
        changes.append(statistics.mean(abs(p - q) for p, q in zip(ours, expected, strict=True)))
        loss = statistics.mean(q - p for p, q in zip(ours, expected, strict=True))
        print(f"{bits} bits: mean loss {loss:.4f}, mean absolute change {changes[-1]:.4f}")
        assert abs(loss) < 0.05
    assert changes[0] < 0.1
    assert changes[1] < 0.3
