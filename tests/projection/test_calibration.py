"""Calibrated bases: the textbook formula by a shorter way, lossless, and better where the text says it matters."""

import pytest
import torch

from xquant_vllm.codec.quantizer import dequantize, quantize
from xquant_vllm.projection.basis import factorize, latent_shape
from xquant_vllm.projection.calibration import (
    INPUT_RIDGE,
    MomentAccumulator,
    ProjectionStatistics,
    key_importance,
    rope_partners,
    value_importance,
)
from xquant_vllm.projection.rope import RotaryTable, apply_rope

HEADS, HEAD_SIZE, HIDDEN = 2, 16, 48


@pytest.fixture
def layer():
    """Weight, skewed inputs with a mean, and channel weights that differ by a factor of 10."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(HEADS * HEAD_SIZE, HIDDEN, generator=generator)
    hidden = torch.randn(600, HIDDEN, generator=generator) * torch.logspace(1, -1, HIDDEN) + 0.5
    importance = key_importance(
        torch.logspace(1, -1, HEADS * HEAD_SIZE).reshape(HEADS, HEAD_SIZE), rope_partners(HEAD_SIZE, HEAD_SIZE, False)
    )
    accumulator = MomentAccumulator(weight)
    for batch in hidden.split(256):
        accumulator.add(batch)
    return weight, hidden, ProjectionStatistics(accumulator.moment(), importance)


def second_moment(hidden):
    moment = (hidden.T @ hidden).double() / len(hidden)
    return moment + INPUT_RIDGE * moment.diagonal().mean() * torch.eye(HIDDEN, dtype=torch.float64)


def test_the_moment_of_the_projections_is_that_of_the_inputs_seen_through_the_weight(layer):
    weight, hidden, statistics = layer
    expected = weight.double() @ second_moment(hidden.double()) @ weight.double().T
    assert torch.allclose(statistics.moment, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["head", "joint"])
def test_channels_are_those_of_the_textbook(layer, kind):
    weight, hidden, statistics = layer
    basis = factorize(
        weight, HEADS, kind, outlier_channels=0, rotate=False, seed=0, dtype=torch.float64, statistics=statistics
    )
    root = torch.linalg.cholesky(second_moment(hidden.double()))
    latent_heads, width = latent_shape(HEADS, HEAD_SIZE, kind)
    columns = weight.double().reshape(latent_heads, width, HIDDEN).mT
    blocks = statistics.importance.unsqueeze(0) if kind == "joint" else statistics.importance.unsqueeze(1)
    for down, w, heads in zip(basis.down, columns, blocks, strict=True):
        u, s, _ = torch.linalg.svd(root.T @ w @ torch.block_diag(*heads), full_matrices=False)
        expected = torch.linalg.inv(root.T) @ u * (s / s.mean()).sqrt().clamp_min(0.05)
        signs = torch.sign((down * expected).sum(0))
        assert torch.allclose(down, expected * signs, atol=1e-8)


@pytest.mark.parametrize("kind", ["head", "joint"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lossless_up_to_the_rounding_of_the_down_projection(layer, kind, dtype, tolerance):
    weight, _, statistics = layer
    basis = factorize(weight, HEADS, kind, outlier_channels=1, rotate=True, seed=0, dtype=dtype, statistics=statistics)
    effective = (basis.down.double().expand(HEADS, -1, -1) @ basis.up.double()).mT.flatten(0, 1)
    assert (effective - weight).norm() / weight.norm() < tolerance


def test_errors_weighted_by_the_queries_shrink(layer):
    weight, hidden, statistics = layer
    keys = (hidden @ weight.T).double().reshape(-1, HEADS, HEAD_SIZE).transpose(0, 1)

    def loss(statistics):
        basis = factorize(
            weight, HEADS, "head", outlier_channels=1, rotate=True, seed=0, dtype=torch.float32, statistics=statistics
        )
        latents = torch.einsum("td,hdw->htw", hidden, basis.down)
        restored = dequantize(*quantize(latents, 3, HEAD_SIZE, 1)) @ basis.up
        return ((restored.double() - keys) @ layer[2].importance).norm().item()

    assert loss(statistics) < 0.85 * loss(None)  # measured: 0.75


def test_directions_that_the_text_never_used_are_kept():
    torch.manual_seed(0)
    weight = torch.randn(16, HIDDEN)
    hidden = torch.zeros(64, HIDDEN)
    hidden[:, :4] = torch.randn(64, 4)
    accumulator = MomentAccumulator(weight)
    accumulator.add(hidden)
    silent = key_importance(torch.zeros(1, 16), torch.arange(16))
    statistics = ProjectionStatistics(accumulator.moment(), silent)
    basis = factorize(
        weight, 1, "head", outlier_channels=0, rotate=True, seed=0, dtype=torch.float32, statistics=statistics
    )
    assert torch.allclose((basis.down[0] @ basis.up[0]).T, weight, atol=1e-4)


@pytest.mark.parametrize(("rotary_size", "interleaved"), [(8, False), (8, True), (4, False), (4, True), (0, False)])
def test_partners_are_the_channels_that_rope_mixes(rotary_size, interleaved):
    angles = torch.linspace(0.3, 1.2, max(rotary_size // 2, 1))[: rotary_size // 2].unsqueeze(0)
    table = RotaryTable(angles.cos(), angles.sin(), interleaved)
    partners = rope_partners(8, rotary_size, interleaved)
    turned = apply_rope(torch.eye(8).unsqueeze(1), torch.zeros(8, dtype=torch.long), table).squeeze(1)
    mixed = (turned != 0) | torch.eye(8, dtype=torch.bool)
    expected = torch.eye(8, dtype=torch.bool)
    expected[torch.arange(8), partners] = True
    assert torch.equal(mixed, expected)


def test_both_channels_of_a_pair_weigh_the_same_and_a_norm_weighs_its_own():
    square = torch.tensor([[4.0, 1.0, 0.0, 9.0]])
    weights = key_importance(square, torch.tensor([2, 1, 0, 3])).diagonal(dim1=1, dim2=2)[0]
    assert torch.allclose(weights, torch.tensor([2.0, 1.0, 2.0, 9.0]).double().sqrt())
    with_norm = key_importance(square, torch.tensor([2, 1, 0, 3]), torch.tensor([1.0, 2.0, 3.0, 1.0]))
    assert torch.allclose(with_norm.diagonal(dim1=1, dim2=2)[0], torch.tensor([2.0, 4.0, 18.0, 9.0]).double().sqrt())


def test_values_weigh_what_the_group_of_output_projections_makes_of_them():
    torch.manual_seed(0)
    output = torch.randn(24, 4 * 8)
    error = torch.randn(5, 8).double()
    for head, importance in enumerate(value_importance(output, 2, 8)):
        group = output[:, head * 16 : head * 16 + 16].double()
        caused = sum((error @ part.T).square().sum() for part in group.split(8, 1))
        assert torch.allclose((error @ importance).square().sum(), caused)
