"""A toy model with the calling conventions of transformers: its modules are run, read, and left with other children."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.modules import DenseLinear
from xquant_vllm.plugin.load.trace.tracer import trace
from xquant_vllm.plugin.load.transformers_backend.calls import record_calls
from xquant_vllm.plugin.load.transformers_backend.hosted import Carrying, stand_before
from xquant_vllm.plugin.load.transformers_backend.keys import find_key_path
from xquant_vllm.plugin.load.transformers_backend.layouts import Apart, Sections, layout_of
from xquant_vllm.plugin.load.transformers_backend.tables import DynamicAnglesError, RotaryTables
from xquant_vllm.projection.key_norm import KeyNorm, normalize
from xquant_vllm.projection.rope import apply_rope

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN = 4, 2, 8, 24
Q_SIZE, KV_SIZE = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
POSITIONS = torch.tensor([0, 3, 7, 50])


def linear(size):
    made = DenseLinear(torch.randn(size, HIDDEN), None)
    made.return_bias = False
    return made


class AnswersWithQueries(nn.Module):
    def forward(self, query, key, value):
        return query


class Attention(nn.Module):
    """As modules of transformers are: a batch of one, and position embeddings from outside."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.turns = turns
        self.attn = AnswersWithQueries()
        self.q_proj, self.k_proj, self.v_proj = (linear(size) for size in (Q_SIZE, KV_SIZE, KV_SIZE))

    def project(self, hidden_states):
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **_):
        parts = [x.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for x in self.project(hidden_states)]
        if self.turns:
            parts[:2] = apply_rotary_pos_emb(*parts[:2], *position_embeddings)
        flat = [part.transpose(1, 2).reshape(hidden_states.shape[1], -1) for part in parts]
        return self.attn.forward(*flat).unsqueeze(0), None


class Fused(Attention):
    """Splits one projection, as vLLM rewrites such modules."""

    def __init__(self, turns: bool) -> None:
        super().__init__(turns)
        del self.q_proj, self.k_proj, self.v_proj
        self.qkv_proj = linear(Q_SIZE + 2 * KV_SIZE)
        self.qkv_proj.output_sizes = [Q_SIZE, KV_SIZE, KV_SIZE]

    def project(self, hidden_states):
        sizes = [size // self.qkv_proj.tp_size for size in self.qkv_proj.output_sizes]
        return self.qkv_proj(hidden_states).split(sizes, -1)


class Decoder(nn.Module):
    """Every other layer turns its keys."""

    def __init__(self, **rope) -> None:
        super().__init__()
        parameters = {"rope_type": "default", "rope_theta": 100.0, **rope}
        config = LlamaConfig(hidden_size=32, num_attention_heads=HEADS, rope_parameters=parameters)
        config.max_position_embeddings = 32
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList([Attention(True), Attention(False), Fused(True), Fused(False)])

    def forward(self, inputs_embeds, position_ids, **_):
        embeddings = self.rotary_emb(inputs_embeds, position_ids)
        for layer in self.layers:
            inputs_embeds = inputs_embeds + layer(inputs_embeds, position_embeddings=embeddings)[0][..., :HIDDEN]
        return inputs_embeds


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return Decoder()


def calls_of(decoder):
    return record_calls(decoder, decoder.layers, torch.randn(len(POSITIONS), HIDDEN), POSITIONS)


def stand_in(owner, call):
    return stand_before(owner, SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE), call)


def by_head(x):
    return x.unflatten(-1, (-1, HEAD_SIZE))


def test_a_module_is_run_at_other_positions_than_those_it_was_seen_at(decoder):
    owner, calls = decoder.layers[0], calls_of(decoder)
    hidden, positions = torch.randn(3, HIDDEN), torch.tensor([1, 9, 30])
    hosted = stand_in(owner, calls[owner])
    query, key, value = capture_qkv("x", hosted, "attn", hidden, positions)
    (table, *_) = RotaryTables(64).of(calls[owner].rotary[0], HEAD_SIZE)
    for turned, plain in zip((query, key), owner.project(hidden)[:2], strict=True):
        torch.testing.assert_close(by_head(turned), apply_rope(by_head(plain), positions, table), atol=1e-5, rtol=0)
    assert torch.equal(value, owner.v_proj(hidden))
    with hosted.turning_nothing():
        found = capture_qkv("x", hosted, "attn", hidden, positions)
    for still, plain in zip(found, owner.project(hidden), strict=True):
        assert torch.equal(still, plain)


@pytest.mark.parametrize("layer", range(4))
def test_keys_and_values_are_found_whether_they_are_turned_or_not(decoder, layer):
    owner = decoder.layers[layer]
    hosted = stand_in(owner, calls_of(decoder)[owner])
    with hosted.turning_nothing():
        found = trace("x", hosted, "attn", KV_SIZE)
    assert (found.key.child, found.value.child) == (("k_proj", "v_proj") if layer < 2 else ("qkv_proj", "qkv_proj"))
    layout = layout_of(found.key, found.value, Q_SIZE, KV_SIZE, HEAD_SIZE)
    assert layout == (Apart(KV_SIZE) if layer < 2 else Sections(Q_SIZE, KV_SIZE))


@pytest.mark.parametrize("layer", range(4))
def test_what_is_cached_passes_untouched_and_queries_are_turned_as_before(decoder, layer):
    owner = decoder.layers[layer]
    hosted = stand_in(owner, calls_of(decoder)[owner])
    hidden = torch.randn(len(POSITIONS), HIDDEN)
    query, _, _ = capture_qkv("x", hosted, "attn", hidden, POSITIONS)
    _, expected_key, expected_value = owner.project(hidden)
    apart = layer < 2
    names = ("k_proj", "v_proj") if apart else ("qkv_proj", "qkv_proj")
    layout = Apart(KV_SIZE) if apart else Sections(Q_SIZE, KV_SIZE)
    hosted.carry(Carrying(layout, *names, needed=owner.turns))
    hosted.leave_keys_alone()
    now, key, value = capture_qkv("x", hosted, "attn", hidden, POSITIONS)
    assert torch.equal(now, query)
    assert torch.equal(key, expected_key)
    assert torch.equal(value, expected_value)
    # The model calls the module itself, with its own arguments.
    decoder(torch.randn(1, 5, HIDDEN), torch.arange(5).unsqueeze(0))


def test_the_layers_of_a_model_share_a_table(decoder):
    calls = calls_of(decoder)
    tables = RotaryTables(64)
    one, other, *_ = (tables.of(calls[layer].rotary[0], HEAD_SIZE) for layer in decoder.layers)
    assert all(first is second for first, second in zip(one, other, strict=True))
    assert tables.of(calls[decoder.layers[0]].rotary[0], HEAD_SIZE - 2) == []


def test_angles_that_change_with_the_batch_are_not_taken():
    torch.manual_seed(0)
    decoder = Decoder(rope_type="dynamic", factor=2.0)
    (call,) = calls_of(decoder)[decoder.layers[0]].rotary
    with pytest.raises(DynamicAnglesError):
        RotaryTables(64).of(call, HEAD_SIZE)
    assert RotaryTables(32).of(call, HEAD_SIZE)


def test_the_key_path_is_found_among_those_that_are_possible(decoder):
    tables = RotaryTables(64).of(calls_of(decoder)[decoder.layers[0]].rotary[0], HEAD_SIZE)
    some = KeyNorm(torch.rand(KV_HEADS, HEAD_SIZE) + 0.5, 1e-6)
    together = KeyNorm(torch.rand(KV_HEADS, HEAD_SIZE) + 0.5, 1e-6, channels=KV_SIZE)
    projected = torch.randn(len(POSITIONS), KV_HEADS, HEAD_SIZE)
    for norm, table, behind in product((None, some, together), (None, *tables), (False, True)):
        if behind and (norm is None or table is None):
            continue
        keys = projected if norm is None or behind else normalize(projected, norm)
        keys = keys if table is None else apply_rope(keys, POSITIONS, table)
        keys = normalize(keys, norm) if behind else keys
        path = find_key_path(projected, keys, POSITIONS, norm, tables)
        assert path.rope is table
        assert path.behind == behind
        assert path.error < 1e-6
    assert find_key_path(projected, projected * torch.arange(HEAD_SIZE), POSITIONS, None, tables).error > 0.1
