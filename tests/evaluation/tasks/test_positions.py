"""Scores by position: buckets are the window, and nothing is lost between them."""

import dataclasses
import json

import pytest
import torch

from xquant_vllm.evaluation.tasks.positions import (
    PositionScores,
    bucket_ends,
    position_lines,
    position_table,
    score_positions,
)
from xquant_vllm.evaluation.tasks.scores import score_window, total


def made(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (tokens,), generator=generator)
    exact, noise = torch.randn(2, tokens, 50, generator=generator)
    # Worse and worse.
    return ids, exact, exact + noise * torch.arange(tokens).unsqueeze(1) / tokens


@pytest.mark.parametrize(("tokens", "buckets"), [(2, 1), (9, 8), (100, 7), (129, 4), (300, 1)])
def test_buckets_are_the_window(tokens, buckets):
    ends = bucket_ends(tokens, buckets)
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert (len(ends), ends[-1], sum(sizes)) == (buckets, tokens - 1, tokens - 1)
    assert max(sizes) - min(sizes) <= 1
    scores = score_positions(*made(tokens), buckets)
    assert list(scores.predicted) == sizes
    together, whole = total(scores.buckets), score_window(*made(tokens))
    assert (together.predicted, together.agreements) == (whole.predicted, whole.agreements)
    assert (together.kl, together.nll, together.nll_16bit) == pytest.approx((whole.kl, whole.nll, whole.nll_16bit))


def test_a_bucket_is_what_it_says():
    ids, exact, read = made(100)
    second = score_positions(ids, exact, read, 3).buckets[1]
    assert second == score_window(ids[33:67], exact[33:66], read[33:66])


def test_a_loss_that_grows_with_the_position_is_seen():
    table = position_table([score_positions(*made(400, seed), 4) for seed in range(3)], 400)
    divergences = [row["kl"] for row in table]
    assert divergences == sorted(divergences)
    assert divergences[3] > 4 * divergences[0]
    assert [(row["first"], row["last"]) for row in table] == [(1, 99), (100, 199), (200, 299), (300, 399)]
    head, *lines = position_lines(table)
    assert "positions" in head
    assert lines[1].split()[0] == "100-199"


def test_they_are_kept_as_json():
    scores = score_positions(*made(50), 5)
    again = PositionScores(**json.loads(json.dumps(dataclasses.asdict(scores))))
    assert again == scores
    assert again.of_16bit().buckets == [score.of_16bit() for score in scores.buckets]
