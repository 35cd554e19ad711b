"""Which models that read images, and which with states beside attention, are refused before a weight is loaded."""

import pytest
import transformers

from tests.plugin.test_checks import configure
from tests.tiny_multimodal import save_isaac
from xquant_vllm.errors import UnsupportedError

_SERVED = {"dtype": "float32", "max_model_len": 256}
_PRE_ROPE = {"kivi": {"pre_rope": True}}
_NAMED = r"IsaacForConditionalGeneration \(.*\) uses multimodal RoPE, several positions per token of an image"
_ADVICE = "serve its text part with --language-model-only, or choose another --attention-backend for this model"


@pytest.fixture(scope="module")
def isaac(tmp_path_factory):
    return str(save_isaac(tmp_path_factory.mktemp("isaac"), interleaved=True))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"limit_mm_per_prompt": {"image": 1}}, {"attention_backend": "kivi", "additional_config": _PRE_ROPE}],
)
def test_images_with_several_positions_per_token_are_refused_with_the_remedy(isaac, arguments):
    with pytest.raises(UnsupportedError, match=_NAMED) as error:
        configure(isaac, **_SERVED, **arguments)
    assert str(error.value).endswith(_ADVICE)


def test_embeddings_of_images_are_images(isaac):
    with pytest.raises(UnsupportedError, match="--language-model-only and without --enable-mm-embeds"):
        configure(isaac, language_model_only=True, enable_mm_embeds=True, **_SERVED)


@pytest.mark.parametrize(
    "arguments",
    [
        {"language_model_only": True},
        {"limit_mm_per_prompt": {"image": 0}},
        {"language_model_only": True, "attention_backend": "kivi", "additional_config": _PRE_ROPE},
        # It caches keys as the model has turned them.
        {"attention_backend": "kivi"},
    ],
)
def test_text_is_served_and_images_whose_keys_are_not_turned_here(isaac, arguments):
    configure(isaac, **_SERVED, **arguments)


@pytest.fixture(scope="module")
def qwen3_next(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3-next")
    config = transformers.Qwen3NextConfig(num_hidden_layers=4, vocab_size=320)
    config.architectures, config.dtype = ["Qwen3NextForCausalLM"], "float32"
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            {"additional_config": {"xquant": {"method": "xquant-cl", "first_layers": 1}}},
            r"'method': 'xquant-cl' cannot work on Qwen3NextForCausalLM .*; set \"method\": \"xquant\"",
        ),
        (
            {"attention_config": {"backend_per_kind": {"full_attention": "CPU_ATTN"}}},
            r"backend_per_kind is not supported for Qwen3NextForCausalLM .*; leave it out",
        ),
        ({"attention_backend": "kivi"}, r"Qwen3NextForCausalLM .* uses state-space or linear attention layers"),
    ],
)
def test_what_states_beside_attention_rule_out(qwen3_next, arguments, named):
    with pytest.raises(UnsupportedError, match=named):
        configure(qwen3_next, **_SERVED, **arguments)


def test_attention_beside_states_is_served(qwen3_next):
    configure(qwen3_next, **_SERVED)
