"""Answers to questions: shares and their intervals, and the page that says what was answered."""

import json

import numpy as np
import pytest

from benchmarks import ask_questions
from benchmarks.accuracy.answers import Answers, changed, difference, share
from benchmarks.accuracy.questions import BASELINE, page
from benchmarks.ask_questions import CACHES, PAGE, bytes_per_token, read_samples, results_of, right

RESULT = json.loads(results_of("smollm2-135m-instruct").read_text())


def test_page_says_what_was_answered():
    text = PAGE.read_text()
    assert page(text, RESULT) == text, "run benchmarks/ask_questions.py --write"


def test_all_caches_have_answered_the_same_questions():
    names = [row["name"] for row in RESULT["rows"]]
    assert names == [cache.name for cache in CACHES if cache.name in names]
    assert names[0] == BASELINE
    for row in RESULT["rows"]:
        assert {task: len(answers) for task, answers in row["right"].items()} == {
            task: about["questions"] for task, about in RESULT["tasks"].items()
        }
        assert all(set(answers) <= {"0", "1"} for answers in row["right"].values())


def test_the_tasks_tell_something_of_this_model():
    plain = RESULT["rows"][0]
    for task, about in RESULT["tasks"].items():
        found = share([Answers(plain["right"][task], about["together"])])
        assert found.least > 0.25, task
        assert found.most < 0.97, task


def test_an_interval_is_that_of_a_share():
    answers = Answers("1" * 300 + "0" * 100)
    found = share([answers])
    error = (0.75 * 0.25 / 400) ** 0.5
    assert found.value == 0.75
    assert found.least == pytest.approx(0.75 - 1.96 * error, abs=0.004)
    assert found.most == pytest.approx(0.75 + 1.96 * error, abs=0.004)
    assert share([answers]) == found  # the same draws
    assert share([answers, Answers("01")]).value == 0.625


def test_answers_to_one_text_are_drawn_together():
    right = "".join("1111" if text % 2 else "0000" for text in range(100))
    apart, together = share([Answers(right)]), share([Answers(right, 4)])
    assert together.value == apart.value == 0.5
    assert together.most - together.least == pytest.approx(2 * (apart.most - apart.least), rel=0.1)


def test_what_both_get_wrong_does_not_widen_their_difference():
    chance = np.random.default_rng(1)
    plain = "".join(chance.choice(["0", "1"], size=400))
    ours = "0" * 10 + plain[10:]
    found = difference([Answers(ours)], [Answers(plain)])
    lost = plain[:10].count("1")
    assert found.value == pytest.approx(-lost / 400)
    assert found.most <= 0
    assert found.most - found.least < 0.03 < share([Answers(plain)]).most - share([Answers(plain)]).least
    assert changed([Answers(ours)], [Answers(plain)]) == (lost, 0)
    assert changed([Answers("110")], [Answers("011")]) == (1, 1)
    assert difference([Answers(plain)], [Answers(plain)]) == (0, 0, 0)


def test_answers_are_read_in_the_order_of_the_questions(tmp_path):
    path = tmp_path / "task.jsonl"
    rows = [{"doc_id": 1, "acc": 0.0}, {"doc_id": 0, "exact_match": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [right(row) for row in read_samples(path)] == [True, False]


def test_bytes_of_caches_whose_server_does_not_say_them(tmp_path):
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    cache = {cache.name: cache for cache in CACHES}
    assert bytes_per_token(cache["16 bit"], None, tmp_path, []) == 23_040
    assert bytes_per_token(cache["FP8"], None, tmp_path, []) == 11_520
    assert bytes_per_token(cache["xquant, data-free, 4"], 6_660, tmp_path, []) == 6_660
    # 1,024 tokens: no key and 128 values of the residual are exact, which are half of 128 tokens.
    kivi = bytes_per_token(cache["KIVI 2, residual 128"], 4_320, tmp_path, [1024, 1024])
    assert kivi == 4_320 + (23_040 - 4_320) * 64 / 1024


def test_nothing_is_asked_twice(monkeypatch, tmp_path):
    monkeypatch.setattr(ask_questions, "RESULTS", tmp_path)
    (tmp_path / "questions-m.json").write_text(json.dumps({"rows": [{"name": CACHES[0].name}]}))
    monkeypatch.setattr(ask_questions.run, "serve_and_evaluate", lambda options: pytest.fail("asked"))
    options = ask_questions.argparse.Namespace(again=False)
    ask_questions.ask(ask_questions.Path("m"), CACHES[0], options)
