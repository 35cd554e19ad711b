"""The pool's memory: the default, what is taken, and what the log says."""

import logging
from types import SimpleNamespace

import pytest
import torch

from xquant_vllm.errors import SettingsError
from xquant_vllm.plugin.hot import budget as hot_budget
from xquant_vllm.plugin.registration import BACKEND_NAME
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.hot_pool import PageNeeds
from xquant_vllm.scheme.hot_share import DEFAULT_SHARE
from xquant_vllm.scheme.settings import parse_settings

LAYERS, HEADS, SIZE, TOTAL, BLOCK = 4, 3, 64, 64 << 20, 32
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
        self.model_config = SimpleNamespace(dtype=dtype, original_max_model_len=max_model_len)
        self.cache_config = SimpleNamespace(block_size=BLOCK)
        self.speculative_config = None
        block_bytes = BLOCK * sum(form.bytes_per_token for form in formats)
        self.needs = PageNeeds(block_bytes, max_model_len // BLOCK, max_model_len)


def take_pool(config, total=TOTAL):
    return hot_budget.take_pool(config, total, lambda: config.needs)


@pytest.fixture(autouse=True)
def _layers(monkeypatch):
    monkeypatch.setattr(hot_budget, "Attention", Layer)


def test_a_share_is_taken_in_whole_tokens(caplog):
    config = Config({"cache": "x", "hot": "25%"})
    taken = take_pool(config)
    tokens = TOTAL // 4 // PER_TOKEN
    assert taken == tokens * PER_TOKEN
    memory = hot_budget.hot_memory(config)
    assert (memory.tokens, memory.taken) == (tokens, taken)
    assert "fewer than one sequence" not in caplog.text


def test_too_small_for_a_sequence_is_warned_of(caplog):
    config = Config({"cache": "x", "hot": 100 * PER_TOKEN})
    assert take_pool(config) == 100 * PER_TOKEN
    assert "holds 100 tokens, fewer than one sequence of --max-model-len 512" in caplog.text
    assert "attended from their pages" in caplog.text


def test_the_default_leaves_pages_for_one_sequence(caplog):
    """A server that starts without a pool starts with the default one; shorter sequences still gain."""
    config = Config({"cache": "x"}, max_model_len=8192)
    total = config.needs.least + 100 * PER_TOKEN
    assert total * DEFAULT_SHARE > 100 * PER_TOKEN
    assert take_pool(config, total) == 100 * PER_TOKEN
    assert "holds 100 tokens, fewer than one sequence of --max-model-len 8,192" in caplog.text


def test_the_default_gives_way_to_pages(caplog):
    config = Config({"cache": "x"})
    assert take_pool(config, config.needs.least + PER_TOKEN) == 0
    assert hot_budget.hot_memory(config).tokens == 0
    assert (
        f"{PER_TOKEN:,} bytes, less than a block, so that pages hold one sequence of --max-model-len 512;"
        in caplog.text
    )


def test_what_is_asked_for_is_given(caplog):
    config = Config({"cache": "x", "hot": "50%"})
    total = config.needs.least + 100 * PER_TOKEN
    assert take_pool(config, total) == total // 2 // PER_TOKEN * PER_TOKEN


def test_vllm_fits_the_length_to_what_the_default_leaves():
    config = Config({"cache": "x"}, max_model_len=8192)
    config.model_config.original_max_model_len = -1
    assert take_pool(config, config.needs.least) == int(config.needs.least * DEFAULT_SHARE) // PER_TOKEN * PER_TOKEN


def test_less_than_a_block_is_no_pool(caplog):
    assert take_pool(Config({"cache": "x", "hot": PER_TOKEN * BLOCK})) == 0
    assert f"hot blocks are off: of 0.06 GiB of cache the pool would be {PER_TOKEN * BLOCK:,} bytes" in caplog.text


def test_times_16_bit_counts_layers_that_keep_keys_and_values():
    config = Config({"method": "xquant-cl", "cache": "x", "bits": 2})
    of_layers = config.compilation_config.static_forward_context
    formats = [layer.impl.scheme.format for layer in of_layers.values()]
    plain = sum(form.plain_bytes_per_token for form in formats)
    ours = sum(form.bytes_per_token for form in formats)
    assert hot_budget.times_plain(*hot_budget.own_layers(config), torch.bfloat16) == plain / ours
    kept = Layer(SimpleNamespace(num_kv_heads=HEADS, head_size=SIZE))
    kept.attn_backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
    of_layers["kept"] = kept
    one = plain // LAYERS
    assert hot_budget.times_plain(*hot_budget.own_layers(config), torch.bfloat16) == (plain + one) / (ours + one)


def test_no_memory_left_for_pages():
    with pytest.raises(SettingsError, match="none would be left for pages; set less"):
        take_pool(Config({"cache": "x", "hot": TOTAL}))


def test_heads_that_vllm_does_not_know_are_not_hot(caplog):
    config = Config({"cache": "x", "hot": "25%"}, head_size=72)
    with caplog.at_level(logging.INFO, "vllm.xquant_vllm"):
        assert take_pool(config) == 0
    assert "hot blocks are off: vLLM's CPU_ATTN does not support heads of 72 channels" in caplog.text


def test_there_is_no_default_on_a_gpu(monkeypatch, caplog):
    """Whatever kernels run there: nothing was measured."""
    monkeypatch.setattr(hot_budget, "_on_cpu", lambda: False)
    monkeypatch.setattr(hot_budget, "rows_on_device", lambda: False)
    with caplog.at_level(logging.INFO, "vllm.xquant_vllm"):
        assert take_pool(Config({"cache": "x"})) == 0
    assert not caplog.text
