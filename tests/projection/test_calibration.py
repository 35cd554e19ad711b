"""Weighted projections: nothing is lost, and a unit of error is a unit of Fisher information in every direction."""

import pytest
import torch

from tests.projection.layer_texts import limited
from xquant_vllm.projection.calibration import (
    GRADIENT_RIDGE,
    INPUT_RIDGE,
    KEY_GRADIENT_RIDGE,
    KEY_WORTH,
    second_moment,
    weigh,
)

TOKENS, KEYS, VALUES = 300, 24, 16


def gradients(generator):
    """Of keys and of values, in very different units, and correlated among channels."""
    key = torch.randn(TOKENS, KEYS, generator=generator) @ torch.randn(KEYS, KEYS, generator=generator)
    value = 1e-3 * torch.randn(TOKENS, VALUES, generator=generator) * torch.logspace(1, -1, VALUES)
    return key.bfloat16(), value.bfloat16()


def fisher_of(key, value):
    """``E[g g^T]``, token by token, with a ridge on each part's own scale; no token has more than its share."""
    parts = [KEY_WORTH**0.5 * limited(key), limited(value)]
    fisher = torch.stack([torch.outer(gradient, gradient) for gradient in torch.cat(parts, 1)]).mean(0)
    ridges = [
        ridge * part.square().mean().expand(part.shape[1])
        for ridge, part in zip((KEY_GRADIENT_RIDGE, GRADIENT_RIDGE), parts, strict=True)
    ]
    return fisher + torch.diag(torch.cat(ridges))


@pytest.fixture(params=[64, 40, 20], ids=["tall", "square", "wide"])
def projection(request):
    """Columns ``[hidden_size, n]`` with gradients: fewer inputs than outputs, as many, more."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(request.param, KEYS + VALUES, generator=generator, dtype=torch.float64)
    return columns, gradients(generator)


def test_nothing_is_lost(projection):
    columns, parts = projection
    weighted = weigh(columns, *parts)
    channels = min(columns.shape)
    assert weighted.into.shape == (columns.shape[0], channels)
    assert weighted.back.shape == (channels, columns.shape[1])
    assert torch.allclose(weighted.into @ weighted.back, columns, atol=1e-6 * columns.abs().max().item())


def test_an_error_of_any_direction_counts_as_the_fisher_information_says(projection):
    columns, parts = projection
    weighted, fisher = weigh(columns, *parts), fisher_of(*parts)
    error = torch.randn(50, weighted.back.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = error @ weighted.back
    cost = torch.stack([e @ fisher @ e for e in outputs])
    assert torch.allclose(cost, error.square().sum(1), rtol=1e-5)


def test_an_error_in_the_input_counts_alike_before_and_after(projection):
    columns, parts = projection
    weighted, fisher = weigh(columns, *parts), fisher_of(*parts)
    error = torch.randn(50, columns.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cost = torch.stack([e @ fisher @ e for e in error @ columns])
    assert torch.allclose((error @ weighted.into).square().sum(1), cost, rtol=1e-5)


def test_a_ridge_is_on_the_scale_of_its_own_part():
    """Keys a million times as steep, but never on the same tokens as values, change nothing for values."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(64, KEYS + VALUES, generator=generator, dtype=torch.float64)
    key, value = (part.double() for part in gradients(generator))
    key[::2] = 0
    value[1::2] = 0
    alone = weigh(columns[:, KEYS:], None, value)
    both = weigh(columns, 1e6 * key, value)
    error = torch.randn(20, VALUES, dtype=torch.float64, generator=generator)
    size = torch.linalg.solve(alone.back.T, error.T).square().sum(0)
    padded = torch.nn.functional.pad(error, (KEYS, 0))
    assert torch.allclose(torch.linalg.solve(both.back.T, padded.T).square().sum(0), size, rtol=1e-6)


def test_a_token_with_a_large_gradient_does_not_decide_for_all_others():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(64, VALUES, generator=generator, dtype=torch.float64)
    ordinary = torch.randn(TOKENS, VALUES, generator=generator, dtype=torch.float64)
    sink = ordinary.clone()
    sink[0] *= 30
    largest, mean = (torch.linalg.eigvalsh(moment) for moment in (sink.T @ sink, ordinary.T @ ordinary))
    assert largest[-1] > 3 * mean[-1]
    costs = torch.linalg.pinv(weigh(columns, None, sink).back)
    assert torch.linalg.eigvalsh(costs @ costs.T)[-1] < 1.1 * mean[-1] / TOKENS


@pytest.mark.parametrize("hidden_size", [64, 20])
def test_gradients_that_are_all_zero_lose_nothing(hidden_size):
    columns = torch.randn(hidden_size, 40, dtype=torch.float64)
    weighted = weigh(columns, torch.zeros(TOKENS, KEYS), torch.zeros(TOKENS, VALUES))
    assert torch.allclose(weighted.into @ weighted.back, columns, atol=1e-6)


def test_the_second_moment_is_that_of_inputs_with_a_ridge():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 32, generator=generator, dtype=torch.float64) + 0.5
    into = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    mean_square = hidden.square().mean().item()
    moment = second_moment(hidden @ into, into, mean_square)
    inputs = hidden.T @ hidden / TOKENS
    inputs += INPUT_RIDGE * inputs.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    assert torch.allclose(moment, into.T @ inputs @ into, rtol=1e-9)
