"""Which new weights are refused, with the reason."""

from types import SimpleNamespace

import pytest

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.reload.refusals import refuse_impossible


def record(*, quantized=False, own_folder=False, mode="NONE", graphs="NONE", architecture="LlamaForCausalLM", **config):
    vllm_config = SimpleNamespace(
        **{"lora_config": None, "kv_transfer_config": None, **config},
        model_config=SimpleNamespace(architecture=architecture, model="somebody/something"),
        compilation_config=SimpleNamespace(
            mode=SimpleNamespace(name=mode), cudagraph_mode=SimpleNamespace(name=graphs)
        ),
    )
    return SimpleNamespace(quantized=quantized, own_folder=own_folder, vllm_config=vllm_config)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"quantized": True}, "were quantized"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"graphs": "FULL", "mode": "VLLM_COMPILE"}, r"CUDA graphs \(cudagraph_mode FULL\) .*cudagraph_mode none"),
        ({"architecture": "GptOssForCausalLM"}, "vLLM's code of GptOssForCausalLM"),
    ],
)
def test_the_reason_is_named_and_what_to_do(what, why):
    pattern = f"^xquant: new weights cannot be loaded .*{why}.* start the server anew"
    with pytest.raises(UnsupportedError, match=pattern):
        refuse_impossible(record(**what))


@pytest.mark.parametrize("mode", ["NONE", "DYNAMO_TRACE_ONCE", "VLLM_COMPILE"])
def test_the_rest_is_loaded(mode):
    refuse_impossible(record(mode=mode))
