"""Loads of the serving benchmark: the same for every method, and as hard as they claim."""

import json
from itertools import pairwise

import pytest
from transformers import AutoConfig

from benchmarks.serving.sizes import FULL, QUICK, Sizes, last_turn_tokens, make_trace, plain_cache_tokens
from benchmarks.serving.trace import RunningText, arrivals, pressure
from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.offline.texts import python_docs_to_evaluate

SIZES = {"users": 3, "turns": 4, "history_tokens": 50, "turn_tokens": 7, "output_tokens": 5, "concurrency": 2}
BLOCK_TOKENS = 128


@pytest.fixture(scope="module")
def text(tokenizer) -> RunningText:
    return RunningText(tokenizer, python_docs_to_evaluate())


def test_histories_grow_and_share_nothing(text) -> None:
    trace = pressure(text, seed=0, **SIZES)
    assert trace == pressure(text, seed=0, **SIZES)
    assert len(trace.prompts) == 3 * 4
    for user in range(3):
        for before, after in pairwise(trace.prompts[user::3]):
            assert after.startswith(before)
            assert after != before
    firsts = [prompt.split()[1] for prompt in trace.prompts[:3]]
    assert len(set(firsts)) == 3
    assert not set(trace.prompts) & set(pressure(text, seed=1, **SIZES).prompts)


def test_histories_have_the_tokens_that_they_are_said_to_have(text) -> None:
    trace = pressure(text, seed=2, **SIZES)
    for index, prompt in enumerate(trace.prompts):
        assert len(text.tokens_of(prompt)) == pytest.approx(50 + 7 * (index // 3), abs=2)


def test_a_round_comes_between_two_turns_of_a_user(text) -> None:
    """So least recently used eviction takes away exactly what is needed next."""
    trace = pressure(text, seed=3, **SIZES)
    users = [prompt.split(".")[0] for prompt in trace.prompts]
    assert users == users[:3] * 4


def test_sources_run_on(text) -> None:
    source, again = text.source(5), text.source(5)
    assert source(4) + source(3) == again(7)
    assert source(7) != again(0)


@pytest.mark.parametrize("sizes", [QUICK, FULL])
def test_pressure_fits_four_bits_and_not_sixteen(text, smollm2, sizes: Sizes) -> None:
    """In blocks, each of which belongs to one history: a load that is a little too large for a cache finds nothing."""
    memory = sizes.cache_mib << 20
    config = AutoConfig.from_pretrained(smollm2)
    plain = plain_cache_tokens(config, memory, 2)
    assert plain == memory // (30 * 2 * 3 * 64 * 2)
    trace, about = make_trace("pressure", sizes, text, plain, 0)
    users, output = about["users"], about["output_tokens"]
    assert users > about["concurrency"]
    lengths = [len(text.tokens_of(prompt)) + output for prompt in trace.prompts[-users:]]
    assert max(lengths) <= last_turn_tokens(sizes.pressure) + 2
    blocks = sum(-(-length // BLOCK_TOKENS) for length in lengths)
    layout = PageLayout(tuple(StreamFormat(3, 64, 4, 64, outliers) for outliers in (1, 0)), BLOCK_TOKENS)
    assert blocks <= 0.95 * (memory // (30 * layout.page_bytes))
    # Between two turns of a user the others' histories pass through what the 16-bit cache has.
    others = sum(len(text.tokens_of(prompt)) for prompt in trace.prompts[1:users])
    assert others > 1.5 * plain


def test_pressure_follows_the_memory(text) -> None:
    users = [make_trace("pressure", QUICK, text, tokens, 0)[1]["users"] for tokens in (1_000, 10_000, 20_000)]
    assert users == [2, 16, 33]


def test_arrivals_vary(text) -> None:
    trace = arrivals(text, requests=40, rate=2.0, prompt_tokens=100, output_tokens=20, seed=0)
    lengths = [len(text.tokens_of(prompt)) for prompt in trace.prompts]
    assert 50 <= min(lengths) < 75
    assert 130 < max(lengths) <= 165
    assert 10 <= min(trace.outputs) < max(trace.outputs) <= 30
    assert trace.rate == 2.0


def test_file_is_what_the_client_reads(text, tmp_path) -> None:
    trace = pressure(text, seed=0, **SIZES)
    trace.write(tmp_path / "trace.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(trace.prompts)
    assert {row["output_tokens"] for row in rows} == {5}
