"""Where hot blocks on a GPU are off, and why: what vLLM's FlashAttention does not do."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from tests.plugin.hot.test_budget import Config, Layer, take_pool
from xquant_vllm.plugin.hot import budget as hot_budget
from xquant_vllm.plugin.hot import flash


def layer(**changes) -> SimpleNamespace:
    return SimpleNamespace(**({"head_size": 64, "num_heads": 8, "has_sinks": False, "logits_soft_cap": None} | changes))


@pytest.fixture
def on_cuda(monkeypatch):
    """A GPU for which vLLM takes a version of FlashAttention."""

    def on_cuda(version: int | None) -> None:
        monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
        monkeypatch.setattr(flash, "flash_version", lambda *_: version)

    return on_cuda


@pytest.mark.parametrize(
    ("version", "dtype", "of_layer", "reason"),
    [
        (3, torch.bfloat16, {}, None),
        (2, torch.float16, {"logits_soft_cap": 30.0}, None),
        (3, torch.bfloat16, {"has_sinks": True}, None),
        (2, torch.bfloat16, {"has_sinks": True}, "FlashAttention 2, the one for this GPU, .* attention sinks"),
        (3, torch.float32, {}, "does not support torch.float32"),
        (3, torch.bfloat16, {"head_size": 264}, "heads of 264 channels"),
        (3, torch.bfloat16, {"head_size": 60}, "heads of 60 channels"),
        (None, torch.bfloat16, {}, "does not support this GPU"),
    ],
)
def test_reasons(on_cuda, version, dtype, of_layer, reason) -> None:
    on_cuda(version)
    actual = flash.flash_unsupported(dtype, [layer(), layer(**of_layer)], 16)
    if reason is None:
        assert actual is None
    else:
        assert re.search(reason, actual or "")


def test_the_twin_has_no_limits() -> None:
    assert flash.flash_unsupported(torch.float32, [layer(head_size=300, has_sinks=True)], 16) is None
    assert flash.flash_version(64, False, None, 16) is None


@pytest.fixture
def kernels_on_device(monkeypatch) -> None:
    monkeypatch.setattr(hot_budget, "Attention", Layer)
    monkeypatch.setattr(hot_budget, "rows_on_device", lambda: True)


@pytest.mark.usefixtures("kernels_on_device")
def test_there_is_no_pool_that_may_be_discarded(caplog) -> None:
    config = Config({"cache": "x", "hot": "25%"})
    config.model_config.enable_sleep_mode = True
    with caplog.at_level(logging.INFO, "vllm.xquant_vllm"):
        assert take_pool(config) == 0
    assert "hot blocks are off: --enable-sleep-mode" in caplog.text


@pytest.mark.usefixtures("kernels_on_device")
def test_there_is_no_pool_unless_it_is_asked_for(caplog) -> None:
    """Nothing was measured that a default could rest on."""
    with caplog.at_level(logging.INFO, "vllm.xquant_vllm"):
        assert take_pool(Config({"cache": "x"})) == 0
    assert not caplog.text
