"""Layers whose keys are normalized in one way or another: exact without quantization, or refused by the setting."""

import pytest
import torch

from xquant_vllm.attention.latents import combine
from xquant_vllm.errors import SettingsError
from xquant_vllm.projection.key_norm import KeyNorm, normalize
from xquant_vllm.projection.rematerialize import rematerialize_keys, rematerialize_values
from xquant_vllm.scheme.builder import LayerParameters, SchemeBuilder
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.settings import parse_settings

TOKENS = 7


def norms(heads: int, head_size: int, generator: torch.Generator) -> dict[str, KeyNorm]:
    weight = torch.rand(heads, head_size, generator=generator) + 0.5
    return {
        "RMS": KeyNorm(weight, 1e-2),
        "LayerNorm": KeyNorm(weight, 1e-2, centered=True),
        "together": KeyNorm(weight, 1e-2, channels=heads * head_size),
    }


def build(settings: dict, parameters: LayerParameters, heads: int, *, together: bool):
    """The only layer of a model."""
    parsed = parse_settings({"factor_cache": False, **settings})
    head_size = parameters.key.shape[0] // heads
    shape = LayerShape(0, parameters.key.shape[1], heads, head_size, keys_normed_together=together)
    formats = layer_formats(parsed, [shape])
    return SchemeBuilder(parsed, formats, FactorProvider(parsed, None, None, None)).build(0, parameters)


@pytest.mark.parametrize("norm", ["RMS", "LayerNorm", "together"])
@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "latent", "bits": 8},
        {"cache": "latent", "bits": 4},
        {"cache": "latent", "bits": {"key": 2, "value": 3}, "basis": "joint"},
        {"cache": "x"},
        {"cache": "x", "rotate": False},
        {"cache": "latent", "method": "xquant-cl"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
@pytest.mark.parametrize(("heads", "head_size", "hidden_size"), [(2, 16, 64), (3, 8, 72), (4, 32, 96)])
def test_nothing_is_lost_but_by_quantization(norm, settings, heads, head_size, hidden_size):
    generator = torch.Generator().manual_seed(heads)
    key, value = torch.randn(2, heads * head_size, hidden_size, generator=generator) / hidden_size**0.5
    of = norms(heads, head_size, generator)[norm]
    together = of.channels is not None
    bias = None if together else torch.randn(heads, head_size, generator=generator)
    parameters = LayerParameters(key, value, bias, None, of)
    if together and (settings["cache"] == "x" or "method" in settings):
        with pytest.raises(SettingsError, match=r"normalizes the keys of all heads together \(layer 0\).*; set "):
            build(settings, parameters, heads, together=True)
        return
    scheme, down = build(settings, parameters, heads, together=together)

    hidden = torch.randn(TOKENS, hidden_size, generator=generator)
    if down is None:
        passed = (hidden, hidden)
    else:
        passed = torch.nn.functional.linear(hidden, down).chunk(2, 1)
    inputs = [x.flatten(1) for x in scheme.inputs(*passed)]
    if scheme.rotation is not None:
        inputs[0] = scheme.rotation.apply(inputs[0])
    latents = [x.unflatten(1, (s.num_heads, s.width)) for x, s in zip(inputs, scheme.format.streams, strict=True)]
    key_latents = combine(scheme.key_terms, [latents[term.stream] for term in scheme.key_terms])
    value_latents = combine(scheme.value_terms, [latents[term.stream] for term in scheme.value_terms])

    keys = (hidden @ key.T).unflatten(1, (heads, head_size))
    expected = normalize(keys if bias is None else keys + bias, of)
    actual = rematerialize_keys(key_latents, torch.arange(TOKENS), scheme.projection)
    assert (actual - expected).norm() <= 2e-3 * expected.norm()
    values = rematerialize_values(value_latents, scheme.projection).flatten(1)
    assert torch.allclose(values, hidden @ value.T, atol=1e-4)


def test_without_a_setting_latents_are_cached_where_the_layer_input_cannot_be():
    """It has fewer channels, and is what is cached of the same layer without such a norm."""
    (plain,) = layer_formats(parse_settings({}), [LayerShape(0, 64, 4, 16)])
    (normed,) = layer_formats(parse_settings({}), [LayerShape(0, 64, 4, 16, keys_normed_together=True)])
    assert (plain.holds, normed.holds) == ("x", "latents")


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"cache": "x"}, 'set "cache": "latent", or leave it out'),
        ({"method": "xquant-cl"}, 'set "method": "xquant"'),
        ({"method": "xquant-cl", "cache": "x"}, 'set "method": "xquant"'),
    ],
)
def test_what_keys_and_values_share_is_refused_with_the_remedy(settings, remedy):
    shapes = [LayerShape(index, 64, 2, 16, keys_normed_together=True) for index in range(2)]
    with pytest.raises(SettingsError, match=remedy):
        layer_formats(parse_settings(settings), shapes)


def test_weights_behind_rope_multiply_queries():
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2 * 16, 48, generator=generator)
    weight = torch.rand(2, 16, generator=generator) + 0.5
    norm = KeyNorm(torch.ones(2, 16), 1e-5, query_weight=weight)
    scheme, _ = build({"cache": "latent"}, LayerParameters(key, value, key_norm=norm), 2, together=False)
    query = torch.randn(TOKENS, 6, 16, generator=generator).bfloat16()
    weighted = scheme.queries(query)
    assert weighted.dtype == query.dtype
    assert torch.equal(weighted, (query.float() * weight.repeat_interleave(3, 0)).bfloat16())
