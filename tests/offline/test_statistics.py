"""Statistics of a text: what the model itself computes, for every way of pairing channels, one layer at a time."""

import gc
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.cli.test_factorize import FakeTokenizer, factorize
from tests.tiny_models import save_tiny_model
from xquant_vllm.integration.factor_header import read_header
from xquant_vllm.offline.checkpoint import open_checkpoint
from xquant_vllm.offline.refused import RefusedError
from xquant_vllm.offline.statistics import collect_statistics, tokenize
from xquant_vllm.projection.calibration import (
    INPUT_RIDGE,
    key_importance,
    rope_partners,
    value_importance,
)
from xquant_vllm.projection.factor_file import FACTORS_FILE

BATCH = torch.arange(2 * 96).reshape(2, 96) * 7 % 300 + 3
# Head size, rotating channels, and whether pairs lie side by side.
ROPE = {"llama": (32, 32, False), "qwen3": (80, 80, False), "phi3-gqa": (32, 32, False), "glm": (32, 16, True)}


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())


def collect(folder):
    collected = []
    collect_statistics(
        open_checkpoint(str(folder)), BATCH, torch.device("cpu"), lambda *arguments: collected.append(arguments)
    )
    assert [layer for layer, _, _ in collected] == [0, 1, 2]
    return [statistics for _, statistics, _ in collected]


def inputs_and_queries(folder, layer):
    """What enters a layer's attention, and its queries before RoPE, from an untouched model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    attention = model.get_submodule(f"model.layers.{layer}.self_attn")
    seen = {}
    attention.register_forward_pre_hook(lambda _, a, options: seen.update(options), with_kwargs=True)
    with torch.no_grad():
        model(BATCH)
        hidden = seen["hidden_states"].flatten(0, 1)
        head_size = attention.head_dim
        if hasattr(attention, "qkv_proj"):
            queries = attention.qkv_proj(hidden)[:, : 4 * head_size]
        else:
            queries = attention.q_proj(hidden)
        queries = queries.view(-1, 4, head_size)
        if hasattr(attention, "q_norm"):
            queries = attention.q_norm(queries)
    return attention, hidden, queries


@pytest.mark.parametrize("family", ROPE)
def test_they_are_those_of_the_untouched_model(tmp_path, family):
    folder = save_tiny_model(tmp_path, family)
    key_statistics, value_statistics = collect(folder)[1]
    attention, hidden, queries = inputs_and_queries(folder, 1)
    head_size, rotary_size, interleaved = ROPE[family]

    hidden = hidden.double()
    moment = hidden.T @ hidden / len(hidden)
    moment.diagonal().add_(INPUT_RIDGE * moment.diagonal().mean())
    key, value = open_checkpoint(str(folder)).key_value(1)
    for weight, statistics in ((key, key_statistics), (value, value_statistics)):
        assert torch.allclose(statistics.moment, weight.double() @ moment @ weight.double().T, rtol=1e-4, atol=1e-6)

    square = queries.square().mean(0).view(2, 2, head_size).mean(1)
    norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None
    expected = key_importance(square, rope_partners(head_size, rotary_size, interleaved), norm)
    assert torch.allclose(key_statistics.importance, expected, rtol=1e-3)
    assert torch.allclose(value_statistics.importance, value_importance(attention.o_proj.weight, 2, head_size))


def test_without_rope_every_channel_is_its_own(tmp_path):
    statistics, _ = collect(save_tiny_model(tmp_path, "opt"))[0]
    diagonal = statistics.importance.diagonal(dim1=1, dim2=2)
    assert diagonal.unique().numel() == diagonal.numel()


def test_only_one_layers_statistics_are_alive(tmp_path):
    folder = save_tiny_model(tmp_path, "llama")
    alive = []

    def on_layer(_, statistics, hidden):
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        alive.extend(weakref.ref(one) for one in statistics)

    collect_statistics(open_checkpoint(str(folder)), BATCH, torch.device("cpu"), on_layer)
    assert len(alive) == 6


def test_a_calibrated_folder_differs_in_nothing_but_its_bases(tmp_path):
    model = save_tiny_model(tmp_path / "model", "llama")
    text = tmp_path / "letters.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and so on " * 40)
    assert factorize(model, tmp_path / "plain") == 0
    assert factorize(model, tmp_path / "calibrated", "--calibration", text, "--calibration-tokens", 256) == 0
    plain, calibrated = (read_header(tmp_path / name) for name in ("plain", "calibrated"))
    assert calibrated.calibration.model_dump() == {"text": "letters.txt", "tokens": 256, "ridge": INPUT_RIDGE}
    assert calibrated.source == plain.source
    assert calibrated.settings == plain.settings
    weights = load_file(model / "model.safetensors")
    tensors = {name: load_file(tmp_path / name / FACTORS_FILE) for name in ("plain", "calibrated")}
    down, up = (tensors["calibrated"][f"layers.2.key.{part}"].double() for part in ("down", "up"))
    assert not torch.equal(down, tensors["plain"]["layers.2.key.down"].double())
    key = weights["model.layers.2.self_attn.k_proj.weight"].double()
    rebuilt = (down @ up).mT.flatten(0, 1)
    assert (rebuilt - key).norm() / key.norm() < 2e-2


def test_sequences_are_spread_over_the_text_and_open_as_the_tokenizer_opens(tmp_path):
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path / "model", "llama")))
    text = tmp_path / "text"
    words = [chr(97 + i % 26) * (1 + i // 26 % 5) for i in range(5000)]
    text.write_text(" ".join(words))
    batch = tokenize(checkpoint, str(text), 2048, 64)
    assert batch.shape == (2, 1024)
    assert (batch[:, 0] == 1).all()
    ids = FakeTokenizer().encode(" ".join(words), add_special_tokens=False)
    assert batch[0, 1:].tolist() == ids[:1023]
    assert batch[1, 1:].tolist() == ids[2 * 1023 : 3 * 1023]
    assert tokenize(checkpoint, "python-docs", 300, 64).shape == (1, 300)
    text.write_text("too short")
    with pytest.raises(RefusedError, match="has 2 tokens, too few"):
        tokenize(checkpoint, str(text), 2048, 64)
