"""Scores of a window against the definitions, and a stream of windows that holds no more than it must."""

import math
import weakref

import pytest
import torch

from xquant_vllm.evaluation.tasks.perplexity import evaluate_windows
from xquant_vllm.evaluation.tasks.scores import score_window, total

WINDOWS = torch.randint(50, (4, 150), generator=torch.Generator().manual_seed(0))


def logits(seed: int) -> torch.Tensor:
    return torch.randn(150, 50, generator=torch.Generator().manual_seed(seed)) * 3


def test_a_score_is_what_it_says():
    p, q = logits(1).double().softmax(-1)[:-1], logits(2).double().softmax(-1)[:-1]
    target = WINDOWS[0, 1:]
    score = score_window(WINDOWS[0], logits(1), logits(2))
    assert score.predicted == 149
    assert score.nll_16bit == pytest.approx(-p[range(149), target].log().sum().item(), rel=1e-5)
    assert score.nll == pytest.approx(-q[range(149), target].log().sum().item(), rel=1e-5)
    assert score.kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert score.agreements == int((p.argmax(-1) == q.argmax(-1)).sum())
    assert score.perplexity == pytest.approx(math.exp(score.nll / 149))
    same = score_window(WINDOWS[0], logits(1), logits(1))
    assert (same.kl, same.agreements, same.nll) == (0.0, 149, same.nll_16bit)
    both = total([score, same])
    assert both.perplexity == pytest.approx(math.exp((score.nll + same.nll) / 298))


def test_log_probabilities_do_as_well_as_logits():
    assert score_window(WINDOWS[0], logits(1), logits(2)).kl == pytest.approx(
        score_window(WINDOWS[0], logits(1).log_softmax(-1), logits(2).log_softmax(-1)).kl, rel=1e-5
    )


def test_windows_come_one_by_one_and_kept_ones_are_not_computed_again():
    kept, alive, computed = {}, [], []

    class Kept:
        def load(self, tokens):
            return kept.get(tuple(tokens.tolist()))

        def save(self, tokens, score):
            kept[tuple(tokens.tolist())] = score

    def make(seed):
        def yields(tokens):
            assert sum(reference() is not None for reference in alive) <= 1
            computed.append(seed)
            result = logits(seed + int(tokens[0]))
            alive.append(weakref.ref(result))
            return result

        return yields

    first = list(evaluate_windows(WINDOWS[:2], make(1), make(2), score_window, Kept()))
    assert computed == [1, 2, 1, 2]
    again = list(evaluate_windows(WINDOWS, make(1), make(2), score_window, Kept()))
    assert computed == [1, 2] * 4
    assert again[:2] == first
    assert next(evaluate_windows(WINDOWS[:1], make(1), None, score_window)).kl == 0
    assert computed[8:] == [1]
