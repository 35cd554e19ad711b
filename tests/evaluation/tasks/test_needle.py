"""Numbers hidden in a text: the prompts, and what counts as found."""

import copy
import math

import pytest
import torch

from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.tasks.needle import NeedleScore, evaluate_needles, score_needle
from xquant_vllm.evaluation.tasks.needle_prompts import NeedlePrompt, needle_prompts
from xquant_vllm.offline.texts import python_docs_to_evaluate

PROMPT = NeedlePrompt(5, 0.5, torch.tensor([1, 2, 3]), torch.tensor([4, 5]))
VOCABULARY = 8


def prompts(tokenizer, lengths=(200,), depths=(0.5,), trials=1, text=None):
    text = text or python_docs_to_evaluate()
    return list(needle_prompts(tokenizer, text, "the text", lengths, depths, trials))


@pytest.fixture
def base_tokenizer(tokenizer):
    """The tokenizer of a model that was never taught to chat."""
    base = copy.copy(tokenizer)
    base.chat_template = None
    return base


@pytest.mark.parametrize("kind", ["tokenizer", "base_tokenizer"])
@pytest.mark.parametrize("length", [120, 257])
def test_the_answer_stands_at_its_depth_and_is_asked_for_at_the_end(request, kind, length):
    tokenizer = request.getfixturevalue(kind)
    places = []
    for prompt in prompts(tokenizer, (length,), (0, 0.25, 0.5, 0.75, 1)):
        assert len(prompt.tokens) == prompt.length == length
        text, number = tokenizer.decode(prompt.prompt), tokenizer.decode(prompt.answer).strip()
        assert 1000 <= int(number) < 10000
        question = text.rpartition("\n")[2].removeprefix("assistant")
        assert text.endswith(question)
        assert question.startswith("The magic number of ")
        assert text.count(number) == 1
        before, _, after = text.partition(f"\n\n{question} {number}.\n\n")
        assert after
        places.append(len(before) / len(text))
        assert ("<|im_start|>" in text) == (kind == "tokenizer")
    assert places == sorted(places)
    assert places[2] - places[0] == pytest.approx(places[4] - places[2], abs=0.15)


def test_trials_have_other_numbers_and_other_texts_but_always_the_same(tokenizer):
    three, again, more = (prompts(tokenizer, (150, 200), trials=trials) for trials in (3, 3, 4))
    texts = [tokenizer.decode(prompt.tokens) for prompt in three]
    assert len(set(texts)) == 6
    assert texts == [tokenizer.decode(prompt.tokens) for prompt in again]
    # More trials take in those that were there.
    assert texts[:3] == [tokenizer.decode(prompt.tokens) for prompt in more][:3]
    assert [(prompt.length, prompt.depth) for prompt in three] == [(150, 0.5)] * 3 + [(200, 0.5)] * 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"depths": (1.5,)}, "--depths 1.5 cannot work"),
        ({"trials": 0}, "--trials 0 cannot work"),
        ({"lengths": (200, 40)}, r"--lengths 40 is too short for the question alone; set \d+ or more"),
        ({"text": "a few words"}, "the text the text has 3 tokens, too few for --lengths 200"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(tokenizer, options, named):
    with pytest.raises(RefusedError, match=named):
        prompts(tokenizer, **options)


def logits_of(*likely):
    """Logits of a model that finds one token after the other most likely, twice as likely as each of the rest."""

    def logits(tokens, last=None):
        assert tokens.tolist() == [1, 2, 3, 4]
        assert last == 2
        return torch.nn.functional.one_hot(torch.tensor(likely), VOCABULARY) * math.log(2)

    return logits


def test_a_number_is_found_if_every_token_is_the_most_likely_one():
    likely, unlikely = math.log((VOCABULARY + 1) / 2), math.log(VOCABULARY + 1)
    assert score_needle(PROMPT, logits_of(4, 5), logits_of(4, 6)) == NeedleScore(
        False, pytest.approx((likely + unlikely) / 2), True, pytest.approx(likely)
    )
    assert score_needle(PROMPT, logits_of(6, 5), logits_of(4, 5)) == NeedleScore(
        True, pytest.approx(likely), False, pytest.approx((likely + unlikely) / 2)
    )
    (score,) = evaluate_needles([PROMPT], logits_of(4, 5), None)
    assert score == score.of_16bit()
