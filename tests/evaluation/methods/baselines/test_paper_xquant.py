"""The paper's XQuant and XQuant-CL against its formulas, written down directly."""

import pytest
import torch

from xquant_vllm.evaluation.methods.baselines.groups import per_channel, per_token
from xquant_vllm.evaluation.methods.baselines.paper_xquant import DenseLayer, PaperXQuant, xquant_bytes
from xquant_vllm.evaluation.methods.baselines.paper_xquant_cl import PaperXQuantCL, xquant_cl_bytes

HIDDEN, TOKENS, LAYERS = 160, 40, 6


def layers(channels: int) -> list[DenseLayer]:
    generator = torch.Generator().manual_seed(channels)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        DenseLayer(normal(HIDDEN, channels), normal(HIDDEN, channels), normal(channels), normal(channels))
        for _ in range(LAYERS)
    ]


def inputs() -> list[torch.Tensor]:
    """What enters the layers: it changes little from one to the next."""
    steps = torch.randn(LAYERS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    return list((steps * torch.tensor([1.0] + [0.2] * (LAYERS - 1)).view(-1, 1, 1)).cumsum(0))


def svd(columns: torch.Tensor) -> list[torch.Tensor]:
    """Signs of singular vectors are arbitrary, but the same for the same numbers."""
    return [part.float() for part in torch.linalg.svd(columns.double(), full_matrices=False)]


def test_grouped_queries_cache_latents_of_keys_by_channel_and_of_values_by_token():
    (layer, *_), (x, *_) = layers(64), inputs()
    keys, values = PaperXQuant([layer], 3).rematerialize(0, x)
    u, s, b = svd(layer.key)
    assert torch.allclose(keys, per_channel(x @ u, 3, 128) @ s.diag() @ b + layer.key_bias, atol=1e-3)
    u, s, b = svd(layer.value)
    assert torch.allclose(values, per_token(x @ u, 3, 128) @ s.diag() @ b + layer.value_bias, atol=1e-3)


def test_multi_head_attention_caches_its_input():
    (layer, *_), (x, *_) = layers(HIDDEN), inputs()
    keys, values = PaperXQuant([layer], 3).rematerialize(0, x)
    read = per_token(x, 3, 128)
    assert torch.allclose(keys, read @ layer.key + layer.key_bias, atol=1e-4)
    assert torch.allclose(values, read @ layer.value + layer.value_bias, atol=1e-4)


def test_a_chain_of_the_input_adds_up_differences():
    model, xs = layers(HIDDEN), inputs()
    method = PaperXQuantCL(model, 2)
    estimate = torch.zeros(TOKENS, HIDDEN)
    for index, (layer, x) in enumerate(zip(model, xs, strict=True)):
        estimate = per_token(x, 4, 128) if index < 3 else estimate + per_token(x - estimate, 2, 128)
        keys, values = method.rematerialize(index, x)
        assert torch.allclose(keys, estimate @ layer.key + layer.key_bias, atol=1e-3)
        assert torch.allclose(values, estimate @ layer.value + layer.value_bias, atol=1e-3)


def test_a_chain_of_latents_adds_up_differences_in_the_space_of_both_projections():
    model, xs = layers(64), inputs()
    method = PaperXQuantCL(model, 2)
    for index in range(2):
        alone = PaperXQuant(model, 4).rematerialize(index, xs[index])
        for read, expected in zip(method.rematerialize(index, xs[index]), alone, strict=True):
            assert torch.equal(read, expected)
    estimate = torch.zeros(TOKENS, HIDDEN)
    for index in range(2, LAYERS):
        layer, x = model[index], xs[index]
        u, _, _ = svd(torch.cat((layer.key, layer.value), 1))
        estimate = estimate + per_token((x - estimate) @ u, 4 if index == 2 else 2, 128) @ u.T
        keys, values = method.rematerialize(index, x)
        assert torch.allclose(keys, estimate @ layer.key + layer.key_bias, atol=1e-3)
        assert torch.allclose(values, estimate @ layer.value + layer.value_bias, atol=1e-3)


@pytest.mark.parametrize("channels", [64, HIDDEN])
def test_a_chain_is_lossless_without_quantization(monkeypatch, channels):
    """Although the latents of grouped queries do not say what the input was."""
    for module, name in (
        ("paper_xquant", "per_token"),
        ("paper_xquant", "per_channel"),
        ("paper_xquant_cl", "per_token"),
    ):
        monkeypatch.setattr(f"xquant_vllm.evaluation.methods.baselines.{module}.{name}", lambda x, *_: x)
    model = layers(channels)
    method = PaperXQuantCL(model, 2)
    for index, (layer, x) in enumerate(zip(model, inputs(), strict=True)):
        for read, exact in zip(method.rematerialize(index, x), layer.rematerialize(x), strict=True):
            assert torch.allclose(read, exact, atol=1e-3)


def test_bytes():
    """SmolLM2: d = 576, d_kv = 192, and 576 with its heads repeated; 30 layers."""
    keys, values = 192 * 3 / 8 + 192 * 4 / 128, 192 * 3 / 8 + 2 * 4  # groups of 128 and 64 channels
    assert xquant_bytes(576, 192, 3) == keys + values
    of_input = 576 / 8 * 3 + 5 * 4
    assert xquant_bytes(576, 576, 3) == of_input
    first = 576 / 8 * 4 + 5 * 4
    assert xquant_cl_bytes(576, 576, 3, 30) == 3 * first + 27 * of_input
    first = 192 * 4 / 8 + 192 * 4 / 128 + 192 * 4 / 8 + 2 * 4
    assert xquant_cl_bytes(576, 192, 3, 30) == 2 * first + (384 * 4 / 8 + 3 * 4) + 27 * (384 * 3 / 8 + 3 * 4)
