"""Following tensors: whichever way a module arranges its rows they are found, and what is more than that is refused."""

import pytest
import torch
from torch import nn

from tests.plugin.load.trace.layouts import (
    HIDDEN,
    KV_SIZE,
    LAYOUTS,
    Q_SIZE,
    Fused,
    Permuted,
    Separate,
    linear,
)
from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.trace.tracer import trace


def follow(module):
    return trace("layers.0.mixer", module, "kernel", KV_SIZE)


def assert_rows_make_keys_and_values(module):
    """The rows found make what the module hands to attention."""
    found = follow(module)
    hidden = torch.randn(5, found.hidden_size)
    _, *made = capture_qkv("x", module, "kernel", hidden, torch.arange(5))
    for source, expected in zip((found.key, found.value), made, strict=True):
        assert module.get_submodule(source.child) is source.linear
        weight, bias = source.take(source.linear.weight.data), source.take(source.linear.bias.data)
        torch.testing.assert_close(hidden @ weight.T + bias, expected)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_found_in_every_layout(layout):
    assert_rows_make_keys_and_values(layout())


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_found_in_any_order(seed):
    module = Permuted(seed)
    found = assert_rows_make_keys_and_values(module)
    assert torch.equal(torch.cat((found.key.rows, found.value.rows)), module.order[Q_SIZE:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_found_in_low_precision(dtype):
    module = Permuted()
    module.mixer.to(dtype)
    assert torch.equal(follow(module).key.rows, follow(Permuted()).key.rows)


def test_only_linear_layers_on_the_way_are_told():
    module = Fused()
    module.after = linear(HIDDEN, width=Q_SIZE)
    assert set(follow(module).linears) == {"mixer"}


class Rotates(nn.Module):
    """Turns queries and keys in place, by positions."""

    def forward(self, positions, query, key):
        factor = (positions + 2)[:, None]
        return query.mul_(factor), key.mul_(factor)


class Norms(Fused):
    """A norm of every key head, then RoPE; the layer input is normalized, too."""

    def __init__(self):
        super().__init__()
        self.before = nn.LayerNorm(HIDDEN)
        self.k_norm, self.q_norm = nn.LayerNorm(16), nn.LayerNorm(16)
        self.rotary_emb = Rotates()

    def forward(self, positions, hidden_states):
        query, key, value = self.split(self.before(hidden_states))
        query = self.q_norm(query.view(-1, 4, 16)).flatten(1)
        # Tokens in the middle.
        key = self.k_norm(key.view(-1, 2, 16).transpose(0, 1)).transpose(0, 1).flatten(1)
        return self.kernel(*self.rotary_emb(positions, query, key), value)


def test_modules_on_the_way_are_told_in_order():
    found = follow(Norms())
    assert [(visit.path, visit.positional) for visit in found.key_steps] == [("k_norm", False), ("rotary_emb", True)]
    assert found.value_steps == ()
    assert torch.equal(found.key.rows, torch.arange(Q_SIZE, Q_SIZE + KV_SIZE))


def test_modules_that_are_not_called_are_not_on_the_way():
    module = Norms()
    module.forward = lambda positions, hidden_states: Fused.forward(module, positions, hidden_states)
    assert follow(module).key_steps == ()


def test_nothing_is_left_in_the_module():
    module = Norms()
    before = [*module.named_modules()]
    follow(module)
    assert [*module.named_modules()] == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def made(change):
    """A module whose keys are something else than rows."""

    class Changes(Fused):
        def split(self, hidden_states):
            query, key, value = super().split(hidden_states)
            return query, change(query, key, value, hidden_states), value

    return Changes


WHOLE = r"32 of 32 channels of its keys, the first of them 0, are not just output rows .* \(mixer\)"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda q, k, v, x: k * torch.arange(1, KV_SIZE + 1), "31 of 32 channels of its keys, the first of them 1"),
        (lambda q, k, v, x: k.clamp(-30, 30), WHOLE),
        (lambda q, k, v, x: k + v, WHOLE),
        (lambda q, k, v, x: k.relu(), WHOLE),
        (lambda q, k, v, x: nn.functional.rms_norm(k, (KV_SIZE,)), WHOLE),
        (lambda q, k, v, x: x[:, :KV_SIZE], WHOLE),
        (
            lambda q, k, v, x: torch.cat((k[:, :-1], 0 * k[:, -1:]), 1),
            "1 of 32 channels of its keys, the first of them 31",
        ),
        (lambda q, k, v, x: v, "rows of its mixer are keys and values at once"),
        (lambda q, k, v, x: k[:, :16].repeat(1, 2), "several channels of its keys are one and the same row"),
        (lambda q, k, v, x: k[:, :16], "it has 16 channels of keys, not 32"),
    ],
)
def test_what_is_not_just_rows_is_refused_by_name(change, problem):
    with pytest.raises(UnsupportedError, match=f"Changes at layers.0.mixer is not recognized: .*{problem}"):
        follow(made(change)())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_common_factor_is_told(dtype):
    module = made(lambda q, k, v, x: 0.3 * k)()
    module.mixer.to(dtype)
    found = follow(module)
    assert found.key.factor == pytest.approx(0.3, rel=0.01)
    assert found.value.factor == 1.0
    assert torch.equal(found.key.rows, torch.arange(Q_SIZE, Q_SIZE + KV_SIZE))


class ScaledThenTurned(Fused):
    """A factor on all keys, then RoPE, as of Falcon-H1; positions have three axes, as of Qwen2-VL."""

    def __init__(self):
        super().__init__()
        self.rotary_emb = Rotates()

    def forward(self, positions, hidden_states):
        query, key, value = self.split(hidden_states)
        assert positions.dim() == 2
        query, key = self.rotary_emb(positions[1], query, 0.7 * key)
        return self.kernel(query, key, value)


def test_modules_behind_a_common_factor_are_told():
    found = trace("layers.0.mixer", ScaledThenTurned(), "kernel", KV_SIZE, position_axes=3)
    assert [visit.path for visit in found.key_steps] == ["rotary_emb"]
    assert found.value_steps == ()
    assert found.key.factor == pytest.approx(0.7, rel=0.01)


class TwoInputs(Separate):
    """Keys of the input, values of something else."""

    def split(self, hidden_states):
        query, key, _ = super().split(hidden_states)
        return query, key, self.own["v"](-hidden_states)


class TwoLayers(Separate):
    """Keys of two linear layers."""

    def split(self, hidden_states):
        query, key, value = super().split(hidden_states)
        return query, torch.cat((key[:, :16], query[:, :16]), 1), value


class NoLinear(Fused):
    """Keys from nowhere."""

    def __init__(self):
        super().__init__()
        self.mixer = nn.Identity()


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (TwoInputs, "its own.k and its own.v are given different inputs"),
        (TwoLayers, r"its keys come from several linear layers \(own.q, own.k\)"),
        (NoLinear, "it has no linear layer beside its `kernel`"),
    ],
)
def test_other_sources_are_refused_by_name(kind, problem):
    with pytest.raises(UnsupportedError, match=f"{kind.__name__} at layers.0.mixer is not recognized: {problem}"):
        follow(kind())
