"""Norms of keys as the models' own formulas have them, and what is left of them where they are taken apart."""

import pytest
import torch

from xquant_vllm.projection.basis import factorize
from xquant_vllm.projection.key_norm import KeyNorm, normalize
from xquant_vllm.projection.key_scale import KeyScale
from xquant_vllm.projection.rematerialize import LayerProjection, rematerialize_keys

HEADS, HEAD_SIZE, HIDDEN, TOKENS = 3, 8, 40, 6


def random_keys(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * (0.7 + torch.randn(TOKENS, HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(seed)))


def random_weights() -> torch.Tensor:
    return torch.rand(HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(9)) + 0.5


@pytest.mark.parametrize("size", [1.0, 1e-2])
@pytest.mark.parametrize("centered", [False, True])
def test_norms_of_heads(size, centered):
    keys, weight = random_keys(0, size), random_weights()
    actual = normalize(keys, KeyNorm(weight, 1e-4, centered))
    for head in range(HEADS):
        if centered:
            expected = torch.nn.functional.layer_norm(keys[:, head], (HEAD_SIZE,), weight[head], None, 1e-4)
        else:
            expected = torch.nn.functional.rms_norm(keys[:, head], (HEAD_SIZE,), weight[head], 1e-4)
        assert torch.allclose(actual[:, head], expected, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_a_norm_over_all_heads(size):
    keys, weight = random_keys(1, size), random_weights()
    expected = torch.nn.functional.rms_norm(keys.flatten(1), (HEADS * HEAD_SIZE,), weight.flatten(), 1e-4)
    actual = normalize(keys, KeyNorm(weight, 1e-4, channels=HEADS * HEAD_SIZE)).flatten(1)
    assert torch.allclose(actual, expected, atol=1e-6)


def test_what_a_layer_norm_leaves_behind_its_up_projection():
    generator = torch.Generator().manual_seed(2)
    up = torch.randn(HEADS, 16, HEAD_SIZE, generator=generator)
    bias = torch.randn(HEADS, HEAD_SIZE, generator=generator)
    latents = torch.randn(TOKENS, HEADS, 16, generator=generator)
    norm = KeyNorm(random_weights(), 1e-3, centered=True)
    projection = LayerProjection(norm.into_up(up), None, norm.into_bias(bias), None, norm.of_heads)
    expected = normalize(torch.einsum("thw,hws->ths", latents, up) + bias, norm)
    actual = rematerialize_keys(latents, torch.arange(TOKENS), projection)
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["head", "joint"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_latents_are_divided_by_what_the_norm_of_their_keys_divides_by(kind, dtype, tolerance, size):
    """Whatever eps is to the keys, and with a down-projection that was rounded."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(HEADS * HEAD_SIZE, HIDDEN, generator=generator).to(dtype)
    hidden = size * torch.randn(TOKENS, HIDDEN, generator=generator)
    basis = factorize(weight, HEADS, kind, outlier_channels=1, rotate=True, seed=0, dtype=dtype)
    norm = KeyNorm(random_weights(), 1e-5, channels=HEADS * HEAD_SIZE)
    scale = KeyScale.of(norm, basis.down, weight)
    latents = torch.einsum("td,hdw->thw", hidden, basis.down.float())
    divided = scale.apply(latents.reshape(TOKENS, HEADS, HEAD_SIZE)).reshape(latents.shape)
    projection = LayerProjection(norm.into_up(basis.up), None, key_norm=norm.of_heads)
    keys = (hidden @ weight.float().T).unflatten(1, (HEADS, HEAD_SIZE))
    error = (rematerialize_keys(divided, torch.arange(TOKENS), projection) - normalize(keys, norm)).abs().max()
    assert error <= tolerance


def test_latents_keep_dtype_and_shape():
    scale = KeyScale(torch.randn(HEADS, HEAD_SIZE, HEAD_SIZE), 1e-6, HEADS * HEAD_SIZE)
    for shape in ((TOKENS, HEADS, HEAD_SIZE), (TOKENS, HEADS * HEAD_SIZE)):
        latents = torch.randn(shape).bfloat16()
        divided = scale.apply(latents)
        assert (divided.shape, divided.dtype) == (latents.shape, latents.dtype)


def test_ranks_divide_by_the_norm_over_all_heads():
    """Two ranks with a part of the heads each, whose sums are added up, and one with all of them."""
    generator = torch.Generator().manual_seed(4)
    latents, up = torch.randn(TOKENS, 4, HEAD_SIZE, generator=generator), torch.randn(4, HEAD_SIZE, HEAD_SIZE)
    alone = KeyScale(up, 1e-3, 4 * HEAD_SIZE).apply(latents)
    squares = torch.einsum("thw,hws->ths", latents, up).square().sum((1, 2), keepdim=True)
    for heads in (slice(0, 1), slice(1, 4)):
        rank = KeyScale(up[heads], 1e-3, 4 * HEAD_SIZE, lambda _: squares)
        assert torch.allclose(rank.apply(latents[:, heads]), alone[:, heads], atol=1e-6)


def test_no_scale_without_a_norm_over_all_heads():
    down, weight = torch.randn(HEADS, HIDDEN, HEAD_SIZE), torch.randn(HEADS * HEAD_SIZE, HIDDEN)
    assert KeyScale.of(None, down, weight) is None
    assert KeyScale.of(KeyNorm(random_weights(), 1e-5), down, weight) is None
