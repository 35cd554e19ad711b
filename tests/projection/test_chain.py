"""Chains are lossless where nothing is quantized, whatever the earlier layers have stored."""

import pytest
import torch

from xquant_vllm.codec.rotation import hadamard_rotation
from xquant_vllm.projection.calibration import key_importance, rope_partners, value_importance
from xquant_vllm.projection.chain import chain_prediction, chain_up_projection, input_up_projection
from xquant_vllm.projection.joint_kv import factorize_joint_kv
from xquant_vllm.projection.predicted import LinkFormat, PredictedChain, layers_of_groups, link_shapes, link_tensors
from xquant_vllm.projection.rematerialize import up_project

HIDDEN, KV_HEADS, HEAD_SIZE, TOKENS = 80, 2, 16, 400
WIDTH = 2 * KV_HEADS * HEAD_SIZE


def weights(generator):
    return (torch.randn(KV_HEADS * HEAD_SIZE, HIDDEN, generator=generator) for _ in range(2))


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_keys_and_values_from_the_rotated_input():
    generator = torch.Generator().manual_seed(0)
    key, _ = weights(generator)
    x, rotation = torch.randn(TOKENS, HIDDEN, generator=generator), hadamard_rotation(HIDDEN, 1)
    for applied, latent in ((rotation, rotation.apply(x)), (None, x)):
        keys = up_project(latent.unsqueeze(1), input_up_projection(key, KV_HEADS, applied))
        assert relative(keys.flatten(1), x @ key.T) < 1e-5


def test_the_papers_chain_is_lossless_without_quantization():
    """``U U^T`` is not the identity, but what it leaves out reaches no key and no value."""
    generator = torch.Generator().manual_seed(0)
    lifts, stored = [], []
    for layer in range(5):
        key, value = weights(generator)
        x = torch.randn(TOKENS, HIDDEN, generator=generator)
        basis = factorize_joint_kv(key, value, outlier_channels=1, rotate=True, seed=layer, dtype=torch.float32)
        own = x @ basis.down[0]
        if lifts:
            own = own - torch.cat(stored, 1) @ chain_prediction(lifts, basis.down[0])[0]
        lifts.append(basis.lift)
        stored.append(own)
        latent = torch.cat(stored, 1).unsqueeze(1)
        for weight in (key, value):
            rebuilt = up_project(latent, chain_up_projection(lifts, weight, KV_HEADS))
            assert relative(rebuilt.flatten(1), x @ weight.T) < 1e-4


def test_the_papers_chain_is_the_accumulator_of_the_paper():
    """Unrolled matrices against ``x_hat += Q((x - x_hat) U) U^T`` with a coarse Q."""
    generator = torch.Generator().manual_seed(0)
    lifts, stored, x_hat = [], [], torch.zeros(TOKENS, HIDDEN)
    for layer in range(4):
        key, value = weights(generator)
        x = torch.randn(TOKENS, HIDDEN, generator=generator)
        basis = factorize_joint_kv(key, value, outlier_channels=0, rotate=False, seed=layer, dtype=torch.float32)
        residual = x @ basis.down[0]
        if lifts:
            residual = residual - torch.cat(stored, 1) @ chain_prediction(lifts, basis.down[0])[0]
        assert relative(residual, (x - x_hat) @ basis.down[0]) < 1e-4
        stored.append((residual * 2).round() / 2)
        lifts.append(basis.lift)
        x_hat = x_hat + stored[-1] @ basis.lift
        rebuilt = up_project(torch.cat(stored, 1).unsqueeze(1), chain_up_projection(lifts, key, KV_HEADS))
        assert relative(rebuilt.flatten(1), x_hat @ key.T) < 1e-4


class Text:
    """Layer inputs that change a little from layer to layer, and the weights that read them."""

    def __init__(self, layers, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs, self.weights = [torch.randn(2 * TOKENS, HIDDEN, generator=generator)], []
        for _ in range(layers):
            self.weights.append(tuple(weights(generator)))
            self.inputs.append(self.inputs[-1] + 0.3 * torch.randn(2 * TOKENS, HIDDEN, generator=generator))
        partners = rope_partners(HEAD_SIZE, HEAD_SIZE, False)
        self.importances = (
            key_importance(torch.rand(KV_HEADS, HEAD_SIZE, generator=generator), partners),
            value_importance(torch.randn(HIDDEN, 2 * KV_HEADS * HEAD_SIZE, generator=generator), KV_HEADS, HEAD_SIZE),
        )


def serve(text, formats, round_trip):
    """Relative errors of keys and values on the half of the text that was not fitted, layer by layer."""
    chain, stored, errors = PredictedChain(rotate=True, dtype=torch.float32), [], []
    for x, pair, form in zip(text.inputs, text.weights, formats, strict=False):
        link = chain.add(x[:TOKENS], *pair, text.importances, form)
        unseen = x[TOKENS:]
        if form.anchor:
            stored = []
        own = unseen @ link.down
        if stored:
            own = own - torch.cat(stored, 1) @ link.prediction[0]
        else:
            assert link.prediction is None
        stored.append(round_trip(own))
        latent = torch.cat(stored, 1).unsqueeze(1)
        errors.append(
            [
                relative(up_project(latent, up).flatten(1), unseen @ weight.T)
                for up, weight in zip((link.up_key, link.up_value), pair, strict=True)
            ]
        )
    return errors


@pytest.mark.parametrize("interval", [1, 3, 6])
def test_a_predicted_chain_is_lossless_without_quantization(interval):
    formats = [LinkFormat(16, 32, 1, layer % interval == 0) for layer in range(6)]
    for key, value in serve(Text(6), formats, lambda x: x):
        assert key < 1e-4
        assert value < 1e-4


def test_a_predicted_chain_leaves_less_to_quantize():
    """With the same step for all, predicted layers are closer: their residuals are smaller."""
    from xquant_vllm.codec.quantizer import dequantize, quantize

    def two_bits(x):
        return dequantize(*quantize(x, 2, 32, 1))

    text = Text(6)
    chained = serve(text, [LinkFormat(2, 32, 1, layer == 0) for layer in range(6)], two_bits)
    alone = serve(text, [LinkFormat(2, 32, 1, True) for layer in range(6)], two_bits)
    for predicted, single in zip(chained[1:], alone[1:], strict=True):
        assert predicted[0] < 0.8 * single[0]
        assert predicted[1] < 0.8 * single[1]


def test_shapes_of_a_link_are_those_announced():
    text, chain = Text(4), PredictedChain(rotate=False, dtype=torch.bfloat16)
    anchors = [True, False, False, True]
    for x, pair, anchor, count in zip(text.inputs, text.weights, anchors, layers_of_groups(anchors), strict=False):
        tensors = link_tensors(chain.add(x[:TOKENS], *pair, text.importances, LinkFormat(4, 32, 0, anchor)))
        expected = link_shapes(HIDDEN, KV_HEADS, HEAD_SIZE, count, torch.bfloat16)
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == expected
    assert layers_of_groups(anchors) == [1, 2, 3, 1]
