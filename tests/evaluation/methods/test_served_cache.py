"""The served cache against its own formulas without pages, and against the model with nothing quantized."""

import pytest
import torch

from tests.tiny_models import save_tiny_model
from xquant_vllm.codec.layout import StreamFormat
from xquant_vllm.codec.quantizer import dequantize, quantize
from xquant_vllm.codec.rotation import hadamard_rotation
from xquant_vllm.errors import SettingsError
from xquant_vllm.evaluation.methods.method_options import MethodOptions
from xquant_vllm.evaluation.methods.methods import prepare_method
from xquant_vllm.evaluation.model.cache_method import CacheMethod
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.checkpoint import open_checkpoint
from xquant_vllm.projection.integer_up import with_integer_up
from xquant_vllm.projection.layer import BasisSpec, factorize_layer

TOKENS = torch.arange(70) * 7 % 300 + 3
FP32 = torch.float32


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def models(family: str) -> HookedModel:
        if family not in made:
            checkpoint = open_checkpoint(str(save_tiny_model(tmp_path_factory.mktemp(family), family)))
            made[family] = HookedModel(checkpoint, FP32, torch.device("cpu"))
        return made[family]

    return models


def prepare(model: HookedModel, method: str, bits: int, **settings):
    options = MethodOptions(bits=(bits,), settings={"factor_cache": False, **settings}, calibration="none")
    return prepare_method(method, options, model.checkpoint, FP32, len(TOKENS))


@pytest.mark.parametrize(
    "family", ["llama-bias", "qwen3", "phi3-gqa", "gemma3", "mha", "opt", "mistral-window", "command-r-plus"]
)
@pytest.mark.parametrize("method", ["xquant", "xquant-cl"])
@pytest.mark.parametrize("cache", ["x", "latent"])
def test_nothing_is_lost_at_16_bits(models, family, method, cache):
    if (family, method) == ("gemma3", "xquant-cl"):
        pytest.skip("kinds of layers with block tables of their own")
    model = models(family)
    # A difference of FP16 numbers from FP16 numbers is small and exact enough; bits of the first layers likewise.
    prepared = prepare(model, method, 16, cache=cache)
    exact, read = model.logits(TOKENS, CacheMethod()), model.logits(TOKENS, prepared.build(model))
    assert (read - exact).abs().max() < 0.02 * exact.abs().max()


def test_keys_that_are_normalized_together_are_read_back_behind_the_norm(models):
    model = models("olmoe-gqa")
    exact = model.logits(TOKENS, CacheMethod())
    cache = prepare(model, "xquant", 16, cache="latent").build(model)
    assert (model.logits(TOKENS, cache) - exact).abs().max() < 0.02 * exact.abs().max()
    hidden = torch.randn(70, 128, generator=torch.Generator().manual_seed(0))
    cache.start(70)
    keys, _ = cache.rematerialize(1, hidden)
    expected = model.layers[1].module.k_norm(hidden @ model.layers[1].weights[0].T)
    assert (keys - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("method", "settings", "remedy"),
    [("xquant", {"cache": "x"}, 'set "cache": "latent"'), ("xquant-cl", {}, 'set "method": "xquant"')],
)
def test_what_the_server_refuses_of_such_keys_is_refused(models, method, settings, remedy):
    with pytest.raises(SettingsError, match=remedy):
        prepare(models("olmoe-gqa"), method, 4, **settings)


def test_latents_are_quantized_head_by_head(models):
    model = models("llama-bias")
    cache = prepare(model, "xquant", 3).build(model)
    hidden = torch.randn(70, 128, generator=torch.Generator().manual_seed(0))
    cache.start(70)
    read = cache.rematerialize(1, hidden)
    spec = BasisSpec("head", 1, 0, True, FP32)
    key, value = factorize_layer(*model.layers[1].weights, 2, spec)
    bases = (with_integer_up(key, StreamFormat(2, 32, 3, 32, 1)), value)
    for what, basis, outliers, bias in zip(read, bases, (1, 0), model.layers[1].biases, strict=True):
        for head in range(2):
            latent = hidden @ basis.down[head]
            expected = dequantize(*quantize(latent, 3, 32, outliers)) @ basis.up[head] + bias[head]
            assert torch.allclose(what.unflatten(1, (2, 32))[:, head], expected, atol=1e-4)


def test_a_chain_adds_up_what_was_read_back(models):
    model = models("mha")
    prepared = prepare(model, "xquant-cl", 2, first_layers=1)
    assert prepared.settings["anchor_interval"] == 0
    cache = prepared.build(model)
    steps = torch.randn(3, 70, 128, generator=torch.Generator().manual_seed(0))
    rotation = hadamard_rotation(128, 2508)
    estimate = torch.zeros(70, 128)
    cache.start(70)
    for layer, (hidden, bits) in enumerate(zip(steps, (4, 2, 2), strict=True)):
        estimate = estimate + dequantize(*quantize(rotation.apply(hidden) - estimate, bits, 128))
        keys, values = cache.rematerialize(layer, hidden)
        for what, weight in zip((keys, values), model.layers[layer].weights, strict=True):
            assert torch.allclose(what, estimate @ rotation.apply(weight).T, atol=1e-3)


def test_bytes_are_those_of_the_pages(models):
    """The formula of docs/design/pages.md: 3 layers; 2 heads of 32, or 128 channels of X."""
    latents = prepare(models("llama-bias"), "xquant", 4)
    assert latents.bytes_per_token == 3 * (2 * (32 / 2 + 4 + 2) + 2 * (32 / 2 + 4))
    chain = prepare(models("mha"), "xquant-cl", 2, first_layers=1)
    assert chain.bytes_per_token == (128 / 2 + 4) + 2 * (128 / 4 + 4)
    for prepared, family in ((latents, "llama-bias"), (chain, "mha")):
        cache = prepared.build(models(family))
        cache.start(16)
        assert sum(pages.numel() for pages in cache._pages) == 16 * prepared.bytes_per_token
