"""Surgery on attention modules that are almost, but not quite, what is recognized."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.modules import DenseLinear
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.plugin.load.surgery import Surgeon
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.settings import parse_settings

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN = 4, 2, 16, 48
LATENTS = {"cache": "latent"}
Q_SIZE, KV_SIZE = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE


class Plain(nn.Module):
    """An attention module without RoPE or norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.Identity()
        self.kv_size = KV_SIZE
        self.qkv_proj = DenseLinear(torch.randn(Q_SIZE + 2 * KV_SIZE, HIDDEN), torch.randn(Q_SIZE + 2 * KV_SIZE))

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


class NeedsMore(Plain):
    """Takes an argument that nobody knows."""

    def forward(self, positions, hidden_states, rotary_offset):
        return self.attn(*self.split(hidden_states))


class Fails(Plain):
    """Fails for inputs like these."""

    def forward(self, positions, hidden_states):
        raise KeyError("layer_scale")


def operate(parts: AttentionParts, settings: dict, dense: DenseLinear):
    """Operate on the only layer of a model."""
    parsed = parse_settings({"factor_cache": False, **settings})
    formats = layer_formats(parsed, [LayerShape(0, HIDDEN, KV_HEADS, HEAD_SIZE)])
    return Surgeon(parsed, formats, FactorProvider(parsed, None, None, None)).operate(0, parts, dense)


def parts_of(module: Plain) -> AttentionParts:
    attention = SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE)
    return AttentionParts("model.layers.0.self_attn", module, attention, module.qkv_proj, Q_SIZE, KV_SIZE, None, None)


def test_a_plain_module_is_operated_on_and_keeps_its_queries():
    module = Plain()
    hidden, positions = torch.randn(5, HIDDEN), torch.arange(5)
    before = capture_qkv("x", module, hidden, positions)
    projection = operate(parts_of(module), LATENTS, module.qkv_proj).projection
    after = capture_qkv("x", module, hidden, positions)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1])
    assert projection.key_bias is not None
    assert torch.count_nonzero(module.qkv_proj.bias[Q_SIZE:]) == 0


@pytest.mark.parametrize("hidden_size", [HIDDEN, Q_SIZE])
def test_a_module_whose_input_is_cached_projects_queries_alone(monkeypatch, hidden_size):
    """Its input passes through, padded to whole heads; the model's code sees as many heads in it."""
    monkeypatch.setattr("tests.plugin.load.test_surgery.HIDDEN", hidden_size)
    module = Plain()
    parts = parts_of(module)
    hidden, positions = torch.randn(5, hidden_size), torch.arange(5)
    before = capture_qkv("x", module, hidden, positions)
    cache = operate(parts, {"cache": "x"}, module.qkv_proj)
    after = capture_qkv("x", module, hidden, positions)
    assert module.qkv_proj.query_proj.weight.shape == (Q_SIZE, hidden_size)
    assert parts.attention.num_kv_heads * HEAD_SIZE == module.kv_size == -(-hidden_size // HEAD_SIZE) * HEAD_SIZE
    assert torch.allclose(after[0], before[0])
    (x,) = cache.inputs(after[1].unflatten(1, (-1, HEAD_SIZE)), after[2])
    assert torch.equal(x, hidden)


def test_keys_treated_in_an_unforeseen_way_are_refused_by_name():
    module = ScalesItsKeys()
    with pytest.raises(UnsupportedError, match=r"ScalesItsKeys at model\.layers\.0\.self_attn .* rematerialized keys"):
        operate(parts_of(module), LATENTS, module.qkv_proj)


@pytest.mark.parametrize(
    ("module", "named"),
    [(NeedsMore(), "its forward takes positions, hidden_states, rotary_offset"), (Fails(), "KeyError: 'layer_scale'")],
)
def test_modules_that_cannot_be_run_are_refused_by_name(module, named):
    with pytest.raises(UnsupportedError, match=named):
        operate(parts_of(module), LATENTS, module.qkv_proj)


def test_a_projection_of_another_shape_is_refused_by_name():
    module = Plain()
    with pytest.raises(UnsupportedError, match="qkv_proj has 120 output rows, expected 64 for queries and 2 x 32"):
        operate(parts_of(module), LATENTS, DenseLinear(module.qkv_proj.weight[:120], None))
