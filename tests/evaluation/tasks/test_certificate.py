"""Certificates: means of all tokens, and intervals that say how sure they are."""

import pytest
import torch

from xquant_vllm.evaluation.tasks.certificate import STRETCH, certificate_of, score_stretches
from xquant_vllm.evaluation.tasks.scores import WindowScore, score_window, total


def made(tokens, seed=0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (tokens,), generator=generator)
    exact = torch.randn(tokens, 50, generator=generator) * 3
    return ids, exact, exact + noise * torch.randn(tokens, 50, generator=generator)


@pytest.mark.parametrize("tokens", [2, STRETCH, STRETCH + 1, STRETCH + 2, 300])
def test_stretches_are_the_window(tokens):
    ids, exact, read = made(tokens)
    scores = score_stretches(ids, exact, read)
    assert all(score.predicted <= STRETCH for score in scores)
    together, whole = total(scores), score_window(ids, exact, read)
    assert (together.predicted, together.agreements) == (whole.predicted, whole.agreements)
    assert (together.kl, together.nll, together.nll_16bit) == pytest.approx((whole.kl, whole.nll, whole.nll_16bit))


def test_means_are_of_tokens_and_intervals_surround_them():
    scores = [score for seed in range(8) for score in score_stretches(*made(512, seed))]
    found, whole = certificate_of(scores, "a text", "float32", 100), total(scores)
    assert found.tokens == whole.predicted == 8 * 511
    assert found.kl.mean == pytest.approx(whole.kl / whole.predicted)
    assert found.increase.mean == pytest.approx(whole.perplexity - whole.perplexity_16bit)
    assert found.top1.mean == pytest.approx(whole.agreements / whole.predicted)
    assert found.perplexity_16bit == pytest.approx(whole.perplexity_16bit)
    for measured in (found.kl, found.increase, found.top1):
        assert measured.low < measured.mean < measured.high
    assert certificate_of(scores, "a text", "float32", 100) == found


def test_an_interval_holds_the_truth_nineteen_times_of_twenty():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        divergences = -torch.rand(64, generator=generator).log()
        scores = [WindowScore(64, 64.0, 64.0, 64 * kl, 60) for kl in divergences.tolist()]
        found = certificate_of(scores, "a text", "float32", 1).kl
        held += found.low <= 1.0 <= found.high
    assert 0.9 <= held / 200 <= 0.99


def test_more_text_makes_it_surer():
    few = certificate_of(score_stretches(*made(512)), "a text", "float32", 1).kl
    many = certificate_of(score_stretches(*made(4096)), "a text", "float32", 1).kl
    assert many.high - many.low < 0.6 * (few.high - few.low)


def test_without_loss_there_is_none():
    ids, exact, _ = made(512)
    found = certificate_of(score_stretches(ids, exact, exact), "a text", "float32", 1)
    assert (found.kl.mean, found.kl.high, found.increase.mean, found.top1.low) == (0.0, 0.0, 0.0, 1.0)
    assert found.describe() == (
        "on a text (511 tokens, not calibrated on): KL divergence 0.000000 (0.000000 to 0.000000), perplexity +0.00 "
        f"(+0.00 to +0.00) beside {found.perplexity_16bit:.2f}, the same most likely token 100.0% (100.0% to 100.0%)"
    )
