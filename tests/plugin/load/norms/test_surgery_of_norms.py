"""Surgery on modules that normalize their keys before RoPE, behind it, or with one norm for queries and keys."""

import pytest
import torch
from torch import nn

from tests.plugin.load.trace.layouts import HEAD_SIZE, HEADS, HIDDEN, KV_HEADS, KV_SIZE, Q_SIZE, FakeAttention
from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.modules import DenseLinear
from xquant_vllm.plugin.load.projections.rows import dense_stand_ins
from xquant_vllm.plugin.load.recognize import recognize
from xquant_vllm.plugin.load.surgery import Surgeon
from xquant_vllm.projection.rematerialize import rematerialize_keys
from xquant_vllm.projection.rope import RotaryTable, apply_rope
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.settings import parse_settings


def table(rotary_size: int = HEAD_SIZE, scale: float = 1.0, interleaved: bool = False) -> RotaryTable:
    angles = torch.arange(1024)[:, None] * 100.0 ** (-torch.arange(0, rotary_size, 2) / rotary_size)
    return RotaryTable(scale * angles.cos(), scale * angles.sin(), interleaved)


class Rotary(nn.Module):
    """Called as vLLM's are."""

    head_size = HEAD_SIZE

    def __init__(self, rope: RotaryTable) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, positions, query, key=None):
        return tuple(
            None if x is None else apply_rope(x.unflatten(-1, (-1, HEAD_SIZE)), positions, self.rope).flatten(1)
            for x in (query, key)
        )


class Norm(nn.Module):
    """An RMS norm, or a LayerNorm."""

    def __init__(self, *shape: int, centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape) if shape else torch.empty(0), requires_grad=False)
        self.has_weight, self.eps, self.centered = bool(shape), 1e-4, centered

    def forward(self, x):
        if self.centered:
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * self.weight if self.has_weight else x


class Attention(nn.Module):
    """Normalizes and turns its keys, in one order or the other; queries only turn."""

    def __init__(self, norm: Norm, rope: RotaryTable, *, behind: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        rows = Q_SIZE + 2 * KV_SIZE
        self.attn, self.behind = FakeAttention(), behind
        self.kv_size, self.num_kv_heads = KV_SIZE, KV_HEADS
        self.qkv_proj = DenseLinear(torch.randn(rows, HIDDEN, generator=generator) * 0.1, None)
        self.rotary_emb, self.k_norm = Rotary(rope), norm
        self.together = norm.weight.shape == (KV_SIZE,)

    def normed(self, key):
        if self.together:
            return self.k_norm(key)
        return self.k_norm(key.unflatten(-1, (-1, HEAD_SIZE))).flatten(1)

    def forward(self, positions, hidden_states):
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([Q_SIZE, self.kv_size, self.kv_size], -1)
        if not self.behind:
            key = self.normed(key)
        query, key = self.rotary_emb(positions, query, key)
        if self.behind:
            key = self.normed(key)
        return self.attn(query, key, value)


class SharesItsNorm(Attention):
    """One norm for queries and keys."""

    def __init__(self, rope: RotaryTable, *, behind: bool) -> None:
        super().__init__(Norm(), rope, behind=behind)
        self.qk_norm = self.k_norm
        del self.k_norm

    def forward(self, positions, hidden_states):
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([Q_SIZE, self.kv_size, self.kv_size], -1)
        for turn in (self.behind, not self.behind):
            if turn:
                query, key = self.rotary_emb(positions, query, key)
            else:
                query, key = (self.qk_norm(x.reshape(-1, HEAD_SIZE)).reshape(x.shape) for x in (query, key))
        return self.attn(query, key, value)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """Tables of these modules, which are not vLLM's."""
    monkeypatch.setattr("xquant_vllm.plugin.load.recognize.read_rope", lambda who, rotary, length: rotary.rope)


def operate(module: Attention, settings: dict):
    """Operate on a module; its scheme, what it handed to attention before and does now, and the positions."""
    parts = recognize("layers.0", module, module.attn)
    together = parts.key_norm.channels is not None
    parsed = parse_settings({"factor_cache": False, **settings})
    formats = layer_formats(parsed, [LayerShape(0, HIDDEN, KV_HEADS, HEAD_SIZE, keys_normed_together=together)])
    hidden, positions = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(5)), torch.arange(9) * 20
    before = capture_qkv("x", module, "attn", hidden, positions)
    surgeon = Surgeon(parsed, formats, FactorProvider(parsed, None, None, None))
    scheme = surgeon.operate(0, parts, dense_stand_ins(parts.sources))
    return scheme, before, capture_qkv("x", module, "attn", hidden, positions), positions


def scores(query, key):
    """Of every query head with its key head: ``[heads, num_tokens, num_tokens]``."""
    query, key = (x.float().unflatten(1, (-1, HEAD_SIZE)) for x in (query, key))
    return torch.einsum("qhs,khs->hqk", query, key.repeat_interleave(HEADS // KV_HEADS, 1))


def assert_scores_stay(scheme, before, after, positions):
    key = scheme.inputs(after[1], after[2])[0]
    if scheme.rotation is not None:
        key = scheme.rotation.apply(key)
    stream = scheme.format.streams[0]
    keys = rematerialize_keys(key.reshape(len(key), stream.num_heads, stream.width), positions, scheme.projection)
    query = scheme.queries(after[0].unflatten(1, (-1, HEAD_SIZE))).flatten(1)
    expected = scores(before[0], before[1])
    assert (scores(query, keys.flatten(1)) - expected).norm() <= 1e-4 * expected.norm()


def weighted(norm: Norm, spread: float, *, paired: bool = False, interleaved: bool = False) -> Norm:
    weight = 1 + spread * torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(7))
    if paired:
        heads = weight.view(-1, HEAD_SIZE)
        if interleaved:
            heads[:, 1::2] = heads[:, 0::2]
        else:
            heads[:, HEAD_SIZE // 2 :] = heads[:, : HEAD_SIZE // 2]
    norm.weight.data = weight
    return norm


SHAPES = [(HEAD_SIZE,), (KV_HEADS, HEAD_SIZE), (KV_SIZE,)]


@pytest.mark.parametrize("shape", SHAPES, ids=["heads", "every head", "all heads"])
@pytest.mark.parametrize("behind", [False, True])
# As a norm is trained, and as it is when training begins, where the order hardly shows in keys.
@pytest.mark.parametrize("spread", [0.5, 0.003])
@pytest.mark.parametrize("rope", [table(), table(8), table(interleaved=True)], ids=["full", "partial", "interleaved"])
def test_the_order_of_norm_and_rope_is_found_out(shape, behind, spread, rope):
    module = Attention(weighted(Norm(*shape), spread), rope, behind=behind)
    scheme, *handed = operate(module, {"cache": "latent", "bits": 8})
    assert (scheme.query_weight is not None) == behind
    assert_scores_stay(scheme, *handed)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("behind", [False, True])
def test_weights_alike_in_every_pair_commute_with_rope(interleaved, behind):
    norm = weighted(Norm(HEAD_SIZE), 0.5, paired=True, interleaved=interleaved)
    scheme, *handed = operate(Attention(norm, table(interleaved=interleaved), behind=behind), {"cache": "x"})
    assert scheme.query_weight is None
    assert_scores_stay(scheme, *handed)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("settings", [{"cache": "latent"}, {"cache": "x"}, {"cache": "latent", "basis": "joint"}])
def test_one_norm_for_queries_and_keys(behind, settings):
    module = SharesItsNorm(table(), behind=behind)
    scheme, *handed = operate(module, {"bits": 8, **settings})
    assert scheme.in_values
    assert torch.allclose(handed[0][0], handed[1][0])  # queries are still normalized
    assert_scores_stay(scheme, *handed)


def test_a_layer_norm_before_rope():
    module = Attention(weighted(Norm(KV_HEADS, HEAD_SIZE, centered=True), 0.3), table(), behind=False)
    scheme, *handed = operate(module, {"cache": "latent", "bits": 8})
    assert_scores_stay(scheme, *handed)


@pytest.mark.parametrize(
    ("norm", "rope", "why"),
    [
        (Norm(KV_HEADS, HEAD_SIZE, centered=True), table(), "subtracts the mean of its keys behind RoPE"),
        (Norm(HEAD_SIZE), table(scale=1.2), "normalizes its keys behind a RoPE that scales them"),
    ],
)
def test_a_norm_behind_rope_that_cannot_precede_it_is_refused(norm, rope, why):
    with pytest.raises(UnsupportedError, match=rf"Attention at layers\.0 {why}, which is not supported"):
        operate(Attention(weighted(norm, 0.2), rope, behind=True), {"cache": "latent"})
