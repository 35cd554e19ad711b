"""Start-up refusals, raised by vLLM's own configuration of a real engine."""

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import save_tiny_model
from xquant_vllm import __version__


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama"))


def configure(model: str, **arguments):
    arguments = {"attention_backend": "xquant", "skip_tokenizer_init": True, "max_model_len": 512, **arguments}
    return EngineArgs(model=model, **arguments).create_engine_config()


@pytest.mark.parametrize("spelling", ["xquant", "XQUANT", "XQuant"])
def test_any_spelling_selects_the_backend(tiny, spelling):
    assert configure(tiny, attention_backend=spelling).attention_config.backend.name == "XQUANT"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_cache_dtypes_that_change_nothing_are_accepted(tiny, dtype):
    configure(tiny, kv_cache_dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"additional_config": {"xquant": {"bits": 6}}}, ["'bits'", "6", "set 8, 4, 3 or 2"]),
        ({"additional_config": {"xquant": {"bitz": 4}}}, ["unknown setting 'bitz'", "did you mean 'bits'?"]),
        ({"additional_config": {"xquant": {"group_size": 24}}}, ["'group_size'", "24", "does not divide the 32"]),
        ({"additional_config": {"xquant": {"first_layers": 9}}}, ["'first_layers'", "9", "has 3 layers"]),
        ({"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype fp8", "leave it out", "bits"]),
        ({"block_size": 8}, ["--block-size 8", "multiple of 16"]),
        ({"enable_lora": True}, ["--enable-lora", "merge the adapter"]),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            ["KV connectors", "leave them out"],
        ),
        ({"load_format": "ipc_cache"}, ["ipc_cache", "use auto"]),
    ],
)
def test_refusals_name_the_cause_and_the_remedy(tiny, arguments, parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - vLLM wraps it in a pydantic error; the parts are checked
        configure(tiny, **arguments)
    for part in parts:
        assert part in str(error.value)


def test_other_backends_are_left_alone(tiny):
    config = configure(tiny, attention_backend="CPU_ATTN", additional_config={"xquant": {"bits": 6}}, block_size=32)
    assert config.attention_config.backend.name == "CPU_ATTN"


def test_the_compile_cache_key_covers_the_version_and_the_settings(tiny):
    default, four = configure(tiny), configure(tiny, additional_config={"xquant": {"bits": 4}})
    assert default.additional_config["xquant_version"] == four.additional_config["xquant_version"] == __version__
    plain = configure(tiny, attention_backend="CPU_ATTN")
    assert "xquant_version" not in plain.additional_config
    assert len({config.compute_hash() for config in (default, four, plain)}) == 3
