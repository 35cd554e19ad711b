"""Surgery on attention modules that are almost, but not quite, what is recognized."""

import pytest
import torch
from torch import nn

from tests.plugin.load.trace.layouts import (
    HEAD_SIZE,
    HIDDEN,
    KV_HEADS,
    KV_SIZE,
    LAYOUTS,
    Q_SIZE,
    FakeAttention,
    PerHead,
    Separate,
    linear,
)
from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.modules import DenseLinear
from xquant_vllm.plugin.load.projections.rows import dense_stand_ins
from xquant_vllm.plugin.load.recognize import AttentionParts, recognize
from xquant_vllm.plugin.load.surgery import Surgeon
from xquant_vllm.projection.rematerialize import rematerialize_keys, rematerialize_values
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.settings import parse_settings

LATENTS = {"cache": "latent"}


class Plain(nn.Module):
    """An attention module without RoPE or norm."""

    def __init__(self, hidden_size: int = HIDDEN) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = FakeAttention()
        self.kv_size = KV_SIZE
        self.qkv_proj = linear(Q_SIZE + 2 * KV_SIZE, width=hidden_size)

    def split(self, hidden_states):
        qkv, _ = self.qkv_proj(hidden_states)
        return qkv.split([Q_SIZE, self.kv_size, self.kv_size], -1)

    def forward(self, positions, hidden_states):
        return self.attn(*self.split(hidden_states))


class ScalesItsKeys(Plain):
    """Multiplies keys by a number per channel: no child module tells of it."""

    def forward(self, positions, hidden_states):
        query, key, value = self.split(hidden_states)
        return self.attn(query, key * torch.arange(KV_SIZE), value)


class ScalesLateKeys(Plain):
    """Multiplies keys by 2 from some position on."""

    def forward(self, positions, hidden_states):
        query, key, value = self.split(hidden_states)
        return self.attn(query, torch.where(positions[:, None] < 500, key, 2 * key), value)


class NeedsMore(Plain):
    """Takes an argument that nobody knows."""

    def forward(self, positions, hidden_states, rotary_offset):
        return self.attn(*self.split(hidden_states))


class Fails(Plain):
    """Fails for inputs like these."""

    def forward(self, positions, hidden_states):
        raise KeyError("layer_scale")


class OtherNames(Plain):
    """Calls its arguments otherwise, in another order, and takes a residual."""

    def forward(self, x, position_ids, residual):
        assert residual is None
        assert position_ids.dtype == torch.int64
        return self.attn(*self.split(x))


def parts_of(module: nn.Module) -> AttentionParts:
    attention = next(child for child in module.children() if isinstance(child, FakeAttention))
    return recognize("model.layers.0.self_attn", module, attention)


def operate(parts: AttentionParts, settings: dict):
    """Operate on the only layer of a model, whose weights are plain."""
    parsed = parse_settings({"factor_cache": False, **settings})
    formats = layer_formats(parsed, [LayerShape(0, parts.key.linear.input_size, KV_HEADS, HEAD_SIZE)])
    surgeon = Surgeon(parsed, formats, FactorProvider(parsed, None, None, None))
    return surgeon.operate(0, parts, dense_stand_ins(parts.sources))


def capture(parts: AttentionParts, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return capture_qkv("x", parts.module, parts.attention_child, hidden, torch.arange(len(hidden)))


@pytest.mark.parametrize("kind", [Plain, OtherNames])
def test_a_plain_module_is_operated_on_and_keeps_its_queries(kind):
    module = kind()
    parts, hidden = parts_of(module), torch.randn(5, HIDDEN)
    before = capture(parts, hidden)
    memory = module.qkv_proj.weight.data_ptr()
    projection = operate(parts, LATENTS).projection
    after = capture(parts, hidden)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1])
    assert projection.key_bias is not None
    assert torch.count_nonzero(module.qkv_proj.bias[Q_SIZE:]) == 0
    assert module.qkv_proj.weight.data_ptr() == memory


def test_rows_that_follow_each_other_are_not_copied():
    parts = parts_of(Plain())
    weight = parts.key.linear.weight.data
    key, value = parts.key.take(weight), parts.value.take(weight)
    assert key.data_ptr() == weight[Q_SIZE:].data_ptr()
    assert value.data_ptr() == weight[Q_SIZE + KV_SIZE :].data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_and_values_of_every_layout_come_back_from_latents(layout):
    parts, hidden = parts_of(layout()), torch.randn(5, HIDDEN)
    before = capture(parts, hidden)
    weights = {path: layer.weight.data_ptr() for path, layer in parts.linears.items()}
    projection = operate(parts, LATENTS).projection
    query, *latents = capture(parts, hidden)
    key, value = (x.unflatten(1, (KV_HEADS, HEAD_SIZE)) for x in latents)
    assert torch.equal(query, before[0])
    keys = rematerialize_keys(key, torch.arange(5), projection).flatten(1)
    torch.testing.assert_close(keys, before[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(rematerialize_values(value, projection).flatten(1), before[2], atol=1e-3, rtol=1e-3)
    # In place, whatever the order of rows.
    assert {path: parts.module.get_submodule(path).weight.data_ptr() for path in weights} == weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layer_input_of_every_layout_reaches_the_cache(layout):
    parts, hidden = parts_of(layout()), torch.randn(5, HIDDEN)
    before = capture(parts, hidden)
    cache = operate(parts, {"cache": "x"})
    query, key, value = capture(parts, hidden)
    torch.testing.assert_close(query, before[0])
    (x,) = cache.inputs(*(x.unflatten(1, (-1, HEAD_SIZE)) for x in (key, value)))
    assert torch.equal(x, hidden)


class MultipliesItsKeys(Plain):
    """Multiplies keys by one number (Falcon-H1)."""

    def forward(self, positions, hidden_states):
        query, key, value = self.split(hidden_states)
        return self.attn(query, 0.3 * key, value)


def test_one_factor_on_all_keys_does_no_harm_to_latents():
    parts, hidden = parts_of(MultipliesItsKeys()), torch.randn(5, HIDDEN)
    _, before, _ = capture(parts, hidden)
    projection = operate(parts, LATENTS).projection
    latents = capture(parts, hidden)[1].unflatten(1, (KV_HEADS, HEAD_SIZE))
    keys = rematerialize_keys(latents, torch.arange(5), projection).flatten(1)
    torch.testing.assert_close(keys, before, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"cache": "x"}, {"method": "xquant-cl", "cache": "latent"}])
def test_one_factor_on_all_keys_is_refused_where_keys_and_values_are_cached_as_one(settings):
    with pytest.raises(UnsupportedError, match=r"MultipliesItsKeys at .* multiplies its keys by 0\.3"):
        operate(parts_of(MultipliesItsKeys()), settings)


@pytest.mark.parametrize("hidden_size", [HIDDEN, Q_SIZE])
def test_a_module_whose_input_is_cached_projects_queries_alone(hidden_size):
    """Its input passes through, padded to whole heads; the model's code sees as many heads in it."""
    module = Plain(hidden_size)
    parts, hidden = parts_of(module), torch.randn(5, hidden_size)
    before = capture(parts, hidden)
    cache = operate(parts, {"cache": "x"})
    after = capture(parts, hidden)
    assert module.qkv_proj.query_proj.weight.shape == (Q_SIZE, hidden_size)
    assert parts.attention.num_kv_heads * HEAD_SIZE == module.kv_size == -(-hidden_size // HEAD_SIZE) * HEAD_SIZE
    assert torch.allclose(after[0], before[0])
    (x,) = cache.inputs(after[1].unflatten(1, (-1, HEAD_SIZE)), after[2])
    assert torch.equal(x, hidden)


class Wide(Separate):
    """An input of more channels than keys and values together have."""

    def __init__(self) -> None:
        super().__init__()
        for letter, layer in self.own.items():
            self.own[letter] = linear(layer.output_size, layer, width=5 * HEAD_SIZE)


def test_an_input_that_does_not_fit_in_the_places_of_keys_and_values_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"Wide at .* cannot cache its input of 80 channels, .* passes 64"):
        operate(parts_of(Wide()), {"cache": "x"})


@pytest.mark.parametrize("kind", [Plain, Separate, PerHead])
def test_projections_that_are_not_the_modules_own_weights_take_their_places(kind):
    """As of quantized layers, whose effective weights they are."""
    parts, hidden = parts_of(kind()), torch.randn(5, HIDDEN)
    before = capture(parts, hidden)
    dense = {
        path: DenseLinear(layer.weight.data.clone(), layer.bias.data.clone(), layer)
        for path, layer in parts.sources.items()
    }
    parsed = parse_settings({"factor_cache": False, **LATENTS})
    formats = layer_formats(parsed, [LayerShape(0, HIDDEN, KV_HEADS, HEAD_SIZE)])
    Surgeon(parsed, formats, FactorProvider(parsed, None, None, None)).operate(0, parts, dense)
    after = capture(parts, hidden)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1])
    for path, layer in dense.items():
        assert parts.module.get_submodule(path) is layer


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (ScalesItsKeys, "channels of its keys, the first of them 0, are not just output rows"),
        (ScalesLateKeys, "its rematerialized keys"),
    ],
)
def test_keys_treated_in_an_unforeseen_way_are_refused_by_name(kind, problem):
    with pytest.raises(UnsupportedError, match=rf"{kind.__name__} at model\.layers\.0\.self_attn .*{problem}"):
        operate(parts_of(kind()), LATENTS)


@pytest.mark.parametrize(
    ("kind", "named"),
    [(NeedsMore, "its forward takes positions, hidden_states, rotary_offset"), (Fails, "KeyError: 'layer_scale'")],
)
def test_modules_that_cannot_be_run_are_refused_by_name(kind, named):
    with pytest.raises(UnsupportedError, match=named):
        parts_of(kind())


def test_a_projection_of_another_shape_is_refused_by_name():
    module = Plain()
    module.attn.num_kv_heads = 1
    with pytest.raises(UnsupportedError, match="it has 32 channels of keys, not 16"):
        parts_of(module)
