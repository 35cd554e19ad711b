"""The pool's memory: the default, what is taken, and what the log says."""

import logging
from types import SimpleNamespace

import pytest
import torch

from xquant_vllm.errors import SettingsError
from xquant_vllm.plugin.backend import hot_budget
from xquant_vllm.plugin.registration import BACKEND_NAME
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.hot_share import DEFAULT_SHARE
from xquant_vllm.scheme.settings import parse_settings

LAYERS, HEADS, SIZE, TOTAL = 4, 3, 64, 64 << 20
PER_TOKEN = LAYERS * 2 * HEADS * SIZE * 2


class Layer:
    """What is asked of vLLM's ``Attention``."""

    def __init__(self, impl) -> None:
        self.impl = impl
        self.attn_backend = SimpleNamespace(get_name=lambda: BACKEND_NAME)


class Config:
    """Of vLLM; can be weakly referenced."""

    def __init__(self, raw, *, head_size=SIZE, max_model_len=512, dtype=torch.bfloat16) -> None:
        settings = parse_settings(raw)
        formats = layer_formats(settings, [LayerShape(i, HEADS * SIZE, HEADS, SIZE) for i in range(LAYERS)])
        impls = [
            SimpleNamespace(
                scheme=SimpleNamespace(format=form), settings=settings, num_kv_heads=HEADS, head_size=head_size
            )
            for form in formats
        ]
        layers = {str(index): Layer(impl) for index, impl in enumerate(impls)}
        self.compilation_config = SimpleNamespace(static_forward_context=layers)
        self.model_config = SimpleNamespace(dtype=dtype, max_model_len=max_model_len)


@pytest.fixture(autouse=True)
def _layers(monkeypatch):
    monkeypatch.setattr(hot_budget, "Attention", Layer)


def test_a_share_is_taken_in_whole_tokens(caplog):
    config = Config({"cache": "x", "hot": "25%"})
    with caplog.at_level(logging.INFO, "vllm.xquant_vllm"):
        taken = hot_budget.take_pool(config, TOTAL)
    tokens = TOTAL // 4 // PER_TOKEN
    assert taken == tokens * PER_TOKEN
    assert hot_budget.hot_memory(config).tokens == tokens
    assert f"up to {tokens:,} tokens in use" in caplog.text
    assert "fewer than one sequence" not in caplog.text


def test_too_small_for_a_sequence_is_warned_of(caplog):
    config = Config({"cache": "x", "hot": 100 * PER_TOKEN})
    assert hot_budget.take_pool(config, TOTAL) == 100 * PER_TOKEN
    assert "holds 100 tokens, fewer than one sequence of --max-model-len 512" in caplog.text
    assert "attended from their pages" in caplog.text


def test_no_memory_left_for_pages():
    with pytest.raises(SettingsError, match="none would be left for pages; set less"):
        hot_budget.take_pool(Config({"cache": "x", "hot": TOTAL}), TOTAL)


def test_heads_that_vllm_does_not_know_are_not_hot(caplog):
    config = Config({"cache": "x", "hot": "25%"}, head_size=72)
    with caplog.at_level(logging.INFO, "vllm.xquant_vllm"):
        assert hot_budget.take_pool(config, TOTAL) == 0
    assert "hot blocks are off: vLLM's CPU_ATTN does not support heads of 72 channels" in caplog.text


@pytest.mark.parametrize(
    ("raw", "share"),
    [
        ({"cache": "latent"}, 0),
        ({"cache": "x"}, DEFAULT_SHARE),
        ({"method": "xquant-cl"}, DEFAULT_SHARE),
        ({"cache": "latent", "hot": 0.5}, 0.5),
        ({"cache": "x", "hot": 0}, 0),
    ],
)
def test_default(raw, share):
    config = Config(raw)
    impls = [layer.impl for layer in config.compilation_config.static_forward_context.values()]
    assert hot_budget.hot_setting(impls[0].settings, [impl.scheme.format for impl in impls]) == share
