"""Replacing keys and values by themselves changes nothing, at every place and in every family; other numbers do."""

import math

import pytest
import torch
import transformers

from tests.tiny_models import save_tiny_model
from xquant_vllm.evaluation.model.cache_method import (
    AttendedMethod,
    CacheMethod,
    InputMethod,
    ProjectedMethod,
    Version,
)
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.checkpoint import open_checkpoint

TOKENS = torch.arange(96) * 7 % 300 + 3
# Bias, key norms over heads in both orders, a fused projection, windows, caps, sinks, no RoPE, partial RoPE.
FAMILIES = [
    "llama-bias",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3-gqa",
    "mistral-window",
    "gpt-oss",
    "granite-swa",
    "opt",
    "glm",
]


class Scaled(InputMethod):
    """Projects as the model does, and multiplies."""

    def __init__(self, model: HookedModel, factor: float) -> None:
        self.layers, self.factor = model.layers, factor

    def rematerialize(self, layer, hidden):
        heads = []
        for weight, bias in zip(self.layers[layer].weights, self.layers[layer].biases, strict=True):
            heads.append((hidden @ weight.T + (0 if bias is None else bias.flatten())) * self.factor)
        return tuple(heads)


class ScaledProjections(ProjectedMethod):
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def keys(self, keys):
        return keys * self.factor

    def values(self, values):
        return values * self.factor


class ScaledHeads(AttendedMethod):
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def read(self, keys, values):
        return (Version(keys * self.factor, values * self.factor),)


class Versions(AttendedMethod):
    """The same numbers, some queries seeing them here and others there."""

    def read(self, keys, values):
        recent = torch.ones(len(keys), len(keys), dtype=torch.bool).triu(-5)
        return Version(keys, values, recent), Version(keys, values, ~recent)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def models(family: str) -> tuple[HookedModel, torch.Tensor, float]:
        """The hooked model, and logits and loss of an untouched one."""
        if family not in made:
            folder = save_tiny_model(tmp_path_factory.mktemp(family), family)
            untouched = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
            with torch.no_grad():
                output = untouched(TOKENS.unsqueeze(0), labels=TOKENS.unsqueeze(0))
            hooked = HookedModel(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))
            made[family] = hooked, output.logits[0], output.loss.item()
        return made[family]

    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_if_what_is_read_is_what_was_written(models, family):
    model, logits, loss = models(family)
    own = torch.nn.functional.cross_entropy(model.logits(TOKENS, CacheMethod())[:-1], TOKENS[1:]).item()
    assert own == pytest.approx(loss, rel=1e-5)
    assert math.isfinite(loss)
    for method in (CacheMethod(), Scaled(model, 1.0), ScaledProjections(1.0), ScaledHeads(1.0), Versions()):
        assert torch.allclose(model.logits(TOKENS, method), logits, atol=1e-3, rtol=1e-3), type(method)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_attention_sees(models, family):
    model, logits, _ = models(family)
    changed = [
        model.logits(TOKENS, method) for method in (Scaled(model, 1.5), ScaledProjections(1.5), ScaledHeads(1.5))
    ]
    assert not torch.allclose(changed[2], logits, atol=0.1)
    assert torch.allclose(changed[1], changed[2], atol=1e-3, rtol=1e-3)
    if family not in ("qwen3", "gemma3"):  # whose norms take the factor off the keys again
        assert torch.allclose(changed[0], changed[2], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_that_are_computed_when_they_are_asked_for_are_the_same(models, family, monkeypatch):
    model, _, _ = models(family)
    method = ScaledHeads(1.5)
    whole = model.logits(TOKENS, method)
    assert isinstance(model.rows(TOKENS, method), torch.Tensor), "of a short window all are there at once"
    monkeypatch.setattr("xquant_vllm.evaluation.model.hooked_model._AT_ONCE", 0)
    rows = model.rows(TOKENS, method)
    # The head of OPT does not read what its body yields.
    assert isinstance(rows, torch.Tensor) == (family == "opt")
    model.logits(TOKENS, CacheMethod())  # what was held does not change with the next run
    for positions in (slice(0, 7), slice(64, len(TOKENS))):
        assert torch.allclose(rows[positions], whole[positions], atol=1e-4, rtol=1e-4)
        assert not rows[positions].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_no_query_of_a_block_sees_are_left_out(models, family, monkeypatch):
    model, logits, _ = models(family)
    monkeypatch.setattr("xquant_vllm.evaluation.model.hooked_model._QUERIES", 36)
    for method in (CacheMethod(), Versions()):
        assert torch.allclose(model.logits(TOKENS, method), logits, atol=1e-3, rtol=1e-3), type(method)


def test_a_sequence_begins_after_it_was_announced(models):
    model, _, _ = models("qwen2")
    started = []

    class Counting(CacheMethod):
        def start(self, num_tokens):
            started.append(num_tokens)

    model.logits(TOKENS, Counting())
    model.logits(TOKENS[:40], Counting())
    assert started == [96, 40]


def test_keys_of_as_many_tokens_as_heads_are_refused(models):
    from xquant_vllm.errors import RefusedError

    model, _, _ = models("qwen3")
    with pytest.raises(RefusedError, match="--window 2 is also the number of kv heads"):
        model.logits(TOKENS[:2], ScaledProjections(1.0))
