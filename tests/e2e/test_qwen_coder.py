"""The real Qwen2.5-Coder 0.5B: large biases on the keys, seven query heads on each of two kv heads."""

import inspect
import statistics

import pytest
import transformers

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

PROGRAM = inspect.getsource(inspect)[:3000]
DEFINITION = "def is_even(number):\n    return number %"


@pytest.fixture(scope="module")
def tokenizer(qwen_coder):
    return transformers.AutoTokenizer.from_pretrained(qwen_coder)


@pytest.fixture(scope="module")
def run(engines, qwen_coder, tokenizer):
    """A continuation, and log-probabilities of a program."""
    tasks = [
        {"kind": "greedy", "prompts": [tokenizer.encode(DEFINITION)], "max_tokens": 6},
        {"kind": "prompt_logprobs", "prompts": [tokenizer.encode(PROGRAM)[:600]]},
    ]

    def run(backend, **xquant):
        return engines.run(qwen_coder, backend, tasks, xquant=xquant or None, dtype="bfloat16", block_size=64)

    return run


@pytest.mark.parametrize("bits", [8, 4])
def test_what_it_says_is_what_it_says_with_16_bit(run, tokenizer, bits):
    ours, plain = run("xquant", bits=bits), run("CPU_ATTN")
    (said,) = ours.tasks[0]["tokens"]
    assert tokenizer.decode(said).startswith(" 2 == 0")
    differences = [
        ours - exact for ours, exact in zip(ours.tasks[1]["logprobs"][0], plain.tasks[1]["logprobs"][0], strict=True)
    ]
    assert statistics.mean(map(abs, differences)) < {8: 0.05, 4: 0.2}[bits]
    assert abs(statistics.mean(differences)) < {8: 0.01, 4: 0.05}[bits]
