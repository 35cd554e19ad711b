"""Loads of the serving benchmark: the same for every method, and as hard as they claim."""

import json
from itertools import pairwise

from benchmarks.serving.trace import arrivals, pressure, words

TEXT = " ".join(f"w{i}" for i in range(5000))
SIZES = {"users": 3, "turns": 4, "history_words": 50, "turn_words": 7, "output_tokens": 5, "concurrency": 2}


def test_histories_grow_and_share_nothing() -> None:
    trace = pressure(TEXT, seed=0, **SIZES)
    assert trace == pressure(TEXT, seed=0, **SIZES)
    assert len(trace.prompts) == 3 * 4
    for user in range(3):
        turns = trace.prompts[user::3]
        assert len(turns[0].split()) == 2 + 50
        for before, after in pairwise(turns):
            assert after.startswith(before)
            assert len(after.split()) == len(before.split()) + 7
    firsts = [prompt.split()[1] for prompt in trace.prompts[:3]]
    assert len(set(firsts)) == 3
    assert not set(trace.prompts) & set(pressure(TEXT, seed=1, **SIZES).prompts)


def test_a_round_comes_between_two_turns_of_a_user() -> None:
    """So least recently used eviction takes away exactly what is needed next."""
    trace = pressure(TEXT, seed=3, **SIZES)
    users = [prompt.split(".")[0] for prompt in trace.prompts]
    assert users == users[:3] * 4


def test_words_run_on() -> None:
    source = words(TEXT, 5)
    first, second = source(4).split(), source(3).split()
    numbers = [int(word[1:]) for word in first + second]
    assert numbers == [(numbers[0] + i) % 5000 for i in range(7)]


def test_arrivals_vary() -> None:
    trace = arrivals(TEXT, requests=40, rate=2.0, prompt_words=100, output_tokens=20, seed=0)
    lengths = [len(prompt.split()) - 2 for prompt in trace.prompts]
    assert 50 <= min(lengths) < 70
    assert 130 < max(lengths) <= 150
    assert 10 <= min(trace.outputs) < max(trace.outputs) <= 30
    assert trace.rate == 2.0


def test_file_is_what_the_client_reads(tmp_path) -> None:
    trace = pressure(TEXT, seed=0, **SIZES)
    trace.write(tmp_path / "trace.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(trace.prompts)
    assert {row["output_tokens"] for row in rows} == {5}
