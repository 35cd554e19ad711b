"""Modules of vLLM's whose models cannot be started: vLLM 0.32 does not load DBRX, whose experts it calls otherwise."""

import pytest
import torch
from transformers import DbrxConfig
from vllm.model_executor.models import dbrx

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.trace.tracer import trace

pytestmark = pytest.mark.usefixtures("one_rank")

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32
Q_SIZE, KV_SIZE = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE


@pytest.fixture
def attention(monkeypatch):
    # vLLM's attention layer asks for a model; it is not run here.
    monkeypatch.setattr(dbrx, "Attention", lambda *_, **__: torch.nn.Identity())
    return dbrx_attention


def dbrx_attention(clip: float | None) -> dbrx.DbrxAttention:
    config = DbrxConfig(
        d_model=Q_SIZE,
        n_heads=HEADS,
        max_seq_len=256,
        attn_config={"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": clip},
    )
    return dbrx.DbrxAttention(config)


def test_dbrx_is_followed(attention):
    found = trace("blocks.0", attention(None), "attn", KV_SIZE)
    assert (found.key.child, found.value.child) == ("Wqkv", "Wqkv")
    assert torch.equal(found.key.rows, torch.arange(Q_SIZE, Q_SIZE + KV_SIZE))
    assert torch.equal(found.value.rows, torch.arange(Q_SIZE + KV_SIZE, Q_SIZE + 2 * KV_SIZE))
    assert [(visit.path, visit.positional) for visit in found.key_steps] == [("rotary_emb", True)]


@pytest.mark.parametrize("clip", [0.5, 8.0, 1000.0])
def test_dbrx_that_clamps_its_keys_is_refused_by_name(attention, clip):
    with pytest.raises(UnsupportedError, match=r"DbrxAttention at blocks.1 .* rows of its linear layers \(Wqkv\)"):
        trace("blocks.1", attention(clip), "attn", KV_SIZE)
