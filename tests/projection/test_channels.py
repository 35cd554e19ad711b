"""Principal channels: in the order of what they are worth, of unit size, rotated among those of the same bits only."""

import pytest
import torch

from xquant_vllm.projection.channels import channel_basis, principal_channels

TOKENS, WIDTH = 500, 24
RUNS = ((4, 4), (3, 8), (2, 8))  # and 4 channels that are not stored


@pytest.fixture(scope="module")
def weighted():
    """Correlated outputs whose channels differ by a factor of 100."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0]
    sizes = torch.logspace(1, -1, WIDTH, dtype=torch.float64)
    return torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64) * sizes @ mixing.T


@pytest.fixture(scope="module")
def channels(weighted):
    return principal_channels(weighted.T @ weighted / TOKENS)


def test_variances_descend_and_are_what_leaving_a_channel_out_costs(weighted, channels):
    assert (channels.variances.diff() <= 0).all()
    for channel in (0, 7, WIDTH - 1):
        vector = channels.vectors[:, channel]
        lost = torch.outer(weighted @ vector, vector).square().sum(1).mean()
        assert torch.allclose(lost, channels.variances[channel], rtol=1e-9)


def test_they_are_the_right_singular_vectors_of_the_sample(weighted, channels):
    _, s, vectors = torch.linalg.svd(weighted, full_matrices=False)
    assert torch.allclose(channels.variances, s.square() / TOKENS)
    cosines = (channels.vectors * vectors.T).sum(0).abs()
    assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-8)


def test_a_moment_that_is_barely_indefinite_has_no_negative_variances():
    moment = torch.diag(torch.tensor([1.0, -1e-18, 0.0], dtype=torch.float64))
    assert (principal_channels(moment).variances >= 0).all()


def test_channels_have_unit_size_on_the_sample(weighted, channels):
    latent = weighted @ channel_basis(channels, RUNS, weighted)
    assert torch.allclose(latent.square().mean(0), torch.ones(WIDTH, dtype=torch.float64))


def test_rotations_stay_inside_runs(weighted, channels):
    seen = channels.vectors.T @ channel_basis(channels, RUNS, weighted)
    inside = torch.zeros(WIDTH, WIDTH, dtype=torch.bool)
    start = 0
    for _, count in RUNS:
        inside[start : start + count, start : start + count] = True
        start += count
    inside.diagonal().fill_(True)  # channels that are not stored stay by themselves
    assert seen[~inside].abs().max() < 1e-9 * seen.abs().max()
    # And there is a rotation: no channel of a run is a principal channel still.
    for start, count in ((0, 4), (4, 8), (12, 8)):
        block = seen[start : start + count, start : start + count]
        block = block / block.norm(dim=0)
        assert torch.allclose(block.T @ block, torch.eye(count, dtype=torch.float64), atol=1e-9)
        assert block.abs().max() < 0.99


def test_channels_of_a_run_come_to_about_the_same_size(weighted, channels):
    sizes = 1 / channel_basis(channels, RUNS, weighted).norm(dim=0)
    plain = channels.variances.sqrt()
    for start, count in ((4, 8), (12, 8)):
        spread, before = ((x[start : start + count].max() / x[start : start + count].min()) for x in (sizes, plain))
        assert before > 3
        assert spread < 0.75 * before


def test_the_same_channels_every_time(weighted, channels):
    first, second = (channel_basis(channels, RUNS, weighted) for _ in range(2))
    assert torch.equal(first, second)


def test_channels_that_the_text_never_used_are_not_blown_up():
    generator = torch.Generator().manual_seed(0)
    weighted = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    weighted[:, :5] = torch.randn(TOKENS, 5, generator=generator, dtype=torch.float64)
    basis = channel_basis(principal_channels(weighted.T @ weighted / TOKENS), RUNS, weighted)
    assert basis.isfinite().all()
    assert basis.abs().max() < 1e7
    silent = channel_basis(principal_channels(0 * weighted.T @ weighted), RUNS, 0 * weighted)
    assert silent.isfinite().all()
