"""Chains are lossless where nothing is quantized, whatever the earlier layers have stored."""

import torch

from xquant_vllm.codec.rotation import hadamard_rotation
from xquant_vllm.projection.chain import chain_prediction, chain_up_projection, input_up_projection
from xquant_vllm.projection.joint_kv import factorize_joint_kv
from xquant_vllm.projection.rematerialize import up_project

HIDDEN, KV_HEADS, HEAD_SIZE, TOKENS = 80, 2, 16, 400


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
