"""Where hot blocks on a GPU are off, and why: what vLLM's FlashAttention does not do."""

import re
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from xquant_vllm.plugin.backend import flash


def layer(**changes) -> SimpleNamespace:
    return SimpleNamespace(**({"head_size": 64, "has_sinks": False, "logits_soft_cap": None} | changes))


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
