"""Start-up refusals, raised by vLLM's own configuration of a real engine, and how its allocator groups the pages."""

import pickle
from pkgutil import resolve_name

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from tests.docs.seam_calls import PLANNING
from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import UnsupportedError
from xquant_vllm.kivi.plugin.residual import ResidualLayer
from xquant_vllm.kivi.plugin.settings import parse_settings
from xquant_vllm.plugin.registration import get_member


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama"))


def configure(model: str, **arguments):
    arguments = {"attention_backend": "kivi", "skip_tokenizer_init": True, "max_model_len": 512, **arguments}
    return EngineArgs(model=model, **arguments).create_engine_config()


def test_the_backend_is_selected_and_survives_into_other_processes(tiny):
    backend = configure(tiny).attention_config.backend
    assert backend.name == "KIVI"
    assert pickle.loads(pickle.dumps(backend)) is get_member("KIVI")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"additional_config": {"kivi": {"bits": 3}}}, ["'bits'", "3", "set 4 or 2"]),
        ({"additional_config": {"kivi": {"residual": 48}}}, ["residual is 48", "multiple of 32"]),
        ({"block_size": 48}, ["block_size = 48", "a multiple of 32"]),
        ({"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype fp8", "leave it out", "kivi"]),
        ({"disable_hybrid_kv_cache_manager": True}, ["--disable-hybrid-kv-cache-manager", "leave it out"]),
        ({"load_format": "ipc_cache"}, ["ipc_cache", "use auto"]),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            ["the KV connector ExampleConnector", "leave it out"],
        ),
        ({"enable_lora": True, "additional_config": {"kivi": {"pre_rope": True}}}, ["--enable-lora", "pre_rope"]),
    ],
)
def test_refusals_name_the_cause_and_the_remedy(tiny, arguments, parts):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - vLLM wraps errors of its configuration
        configure(tiny, **arguments)
    message = str(caught.value)
    assert "kivi:" in message
    for part in parts:
        assert part in message


def test_layers_with_sinks_are_refused_by_name(tiny):
    """Where vLLM chooses a backend, and where a layer is built."""
    from xquant_vllm.kivi.plugin.backend import KiviBackend
    from xquant_vllm.kivi.plugin.impl import KiviImpl

    assert not KiviBackend.supports_sink()
    named = r"^kivi: LlamaForCausalLM asks its attention for sinks, which is not supported; choose another"
    with set_current_vllm_config(configure(tiny)), pytest.raises(UnsupportedError, match=named):
        KiviImpl(4, 32, 1.0, 2, sinks=torch.zeros(4))


def test_quantized_pages_and_residuals_share_one_pool(tiny):
    """vLLM makes two groups of blocks with the same bytes: one grows with a sequence, the other does not."""
    config = configure(tiny)
    config.cache_config.kv_cache_layout = "LBNHC"
    quantized, residual = parse_settings(None).layouts(3, 64, torch.bfloat16, None)
    specs = {}
    for layer in range(4):
        specs[f"layers.{layer}.attn"] = FullAttentionSpec(
            block_size=quantized.block_size,
            num_kv_heads=3,
            head_size=64,
            dtype=torch.uint8,
            num_head_slots=1,
            state_content_bytes=quantized.bytes_per_token,
        )
        companion = ResidualLayer(residual, 128, quantized.page_bytes)
        specs[f"layers.{layer}.attn.residual"] = companion.get_kv_cache_spec(config)
    codes, window = resolve_name(f"{PLANNING}.get_kv_cache_groups")(config, specs)
    assert isinstance(codes.kv_cache_spec, FullAttentionSpec)
    assert isinstance(window.kv_cache_spec, SlidingWindowSpec)
    assert len(codes.layer_names) == len(window.layer_names) == 4
    assert codes.kv_cache_spec.page_size_bytes == window.kv_cache_spec.page_size_bytes == 64 * 240
    assert window.kv_cache_spec.sliding_window == 128
    assert window.kv_cache_spec.unpadded_page_size_bytes == 16 * 768
