"""Order and content of what happens to a key behind the cache."""

import pytest
import torch

from xquant_vllm.projection.rematerialize import (
    HeadNorm,
    LayerProjection,
    rematerialize_keys,
    rematerialize_values,
)
from xquant_vllm.projection.rope import RotaryTable, apply_rope


@pytest.mark.parametrize("latent_heads", [1, 2])
@pytest.mark.parametrize("weights", [(8,), (2, 8)])
def test_up_projection_then_bias_then_norm_then_rope(latent_heads, weights):
    torch.manual_seed(0)
    angles = torch.rand(10, 4)
    projection = LayerProjection(
        up_key=torch.randn(2, 16, 8),
        up_value=torch.randn(2, 16, 8),
        key_bias=torch.randn(2, 8),
        value_bias=torch.randn(2, 8),
        key_norm=HeadNorm(torch.rand(weights) + 0.5, 1e-6),
        rope=RotaryTable(angles.cos(), angles.sin()),
    )
    latents, positions = torch.randn(5, latent_heads, 16), torch.tensor([9, 0, 4, 4, 1])
    keys, values = rematerialize_keys(latents, positions, projection), rematerialize_values(latents, projection)
    for head in range(2):
        latent = latents[:, head if latent_heads == 2 else 0]
        key = latent @ projection.up_key[head] + projection.key_bias[head]
        key = torch.nn.functional.rms_norm(key, (8,), projection.key_norm.weights(2)[head], 1e-6)
        expected = apply_rope(key[:, None], positions, projection.rope)[:, 0]
        assert torch.allclose(keys[:, head], expected, atol=1e-5)
        assert torch.allclose(
            values[:, head], latent @ projection.up_value[head] + projection.value_bias[head], atol=1e-5
        )
