"""Which new weights are refused, with the reason."""

from types import SimpleNamespace

import pytest

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.reload.refusals import refuse_impossible


def record(*, quantized=False, own_folder=False, device="cpu", graphs="NONE", **config):
    vllm_config = SimpleNamespace(
        **{"lora_config": None, "kv_transfer_config": None, "model_config": None, **config},
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name=graphs)),
        device_config=SimpleNamespace(device_type=device),
    )
    return SimpleNamespace(quantized=quantized, own_folder=own_folder, vllm_config=vllm_config)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"quantized": True}, "were quantized"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"device": "cuda", "graphs": "FULL"}, "--enforce-eager"),
    ],
)
def test_the_reason_is_named_and_what_to_do(what, why):
    pattern = f"^xquant: new weights cannot be loaded .*{why}.* start the server anew"
    with pytest.raises(UnsupportedError, match=pattern):
        refuse_impossible(record(**what))


@pytest.mark.parametrize("what", [{}, {"device": "cuda"}, {"graphs": "FULL"}])
def test_the_rest_is_loaded(what):
    refuse_impossible(record(**what))
