"""Attention sinks on their way from vLLM's layer into the plan."""

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import AttentionType

from tests.plugin.test_checks import configure
from tests.tiny_models import save_tiny_model
from xquant_vllm.codec.layout import StreamFormat
from xquant_vllm.plugin.backend.backend import XQuantBackend
from xquant_vllm.plugin.backend.impl import XQuantImpl
from xquant_vllm.projection.rematerialize import LayerProjection
from xquant_vllm.scheme.formats import LayerFormat, LayerShape
from xquant_vllm.scheme.layer_scheme import LayerScheme


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return configure(str(save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama")))


@pytest.fixture(scope="module")
def scheme():
    form = LayerFormat(LayerShape(0, 64, 2, 32), "latent", (StreamFormat(2, 32, 4, 32),) * 2)
    return LayerScheme(form, LayerProjection(torch.randn(2, 32, 32), torch.randn(2, 32, 32)))


def reasons_against(backend, **asked):
    selection = {"head_size": 32, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": None}
    selection |= {"use_mla": False, "has_sink": True, "use_sparse": False, "use_mm_prefix": False}
    selection |= {"use_per_head_quant_scales": False, "device_capability": None, "attn_type": AttentionType.DECODER}
    return backend.validate_configuration(**selection | asked)


def test_vllm_may_choose_the_backend_for_layers_with_sinks():
    assert reasons_against(XQuantBackend) == []


def test_sinks_make_no_encoder_served():
    """As of openai/privacy-filter, whose attention is GPT-OSS's in both directions."""
    (reason,) = reasons_against(XQuantBackend, attn_type=AttentionType.ENCODER_ONLY)
    assert reason == "attention type AttentionType.ENCODER_ONLY not supported"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_are_read_once_the_weights_are_loaded(config, scheme, dtype):
    """A model builds its layers first, with a parameter that has no values yet."""
    sinks = torch.nn.Parameter(torch.full((4,), torch.nan, dtype=dtype))
    with set_current_vllm_config(config):
        impl = XQuantImpl(4, 32, 1.0, 2, sinks=sinks)
    loaded = torch.tensor([0.5, -1.25, 3.0, 0.1])
    sinks.data.copy_(loaded)
    impl.set_scheme(scheme, [])
    planned = impl.plan(16).sinks
    assert planned.dtype == torch.float32
    assert not planned.requires_grad
    assert torch.equal(planned, loaded.to(dtype).float())


def test_layers_without_sinks_have_none(config, scheme):
    with set_current_vllm_config(config):
        impl = XQuantImpl(4, 32, 1.0, 2, sinks=None)
    impl.set_scheme(scheme, [])
    assert impl.plan(16).sinks is None
