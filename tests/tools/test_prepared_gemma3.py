"""The Gemma 3 270M folder that tools/prepare_model.py makes: what a GGUF does not tell must be right as well."""

import json
import re

import pytest
import torch
import transformers
from model_prep.checkpoint import Checkpoint, read
from model_prep.gemma3 import CONFIG, LONG_TEXT, RECIPE
from model_prep.recipe import PrepareError

from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def gemma_tokenizer(gemma3):
    return transformers.AutoTokenizer.from_pretrained(gemma3)


def test_config_is_the_published_one(gemma3):
    config = json.loads((gemma3 / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [5, 11, 17]
    assert config["sliding_window"] == 512
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4
    assert config.keys() >= CONFIG.keys(), "what is checked is written as well, not left to a reader's defaults"


def test_licence_is_named():
    assert "Gemma Terms of Use" in RECIPE.title


def test_texts_begin_with_one_bos(gemma3, gemma_tokenizer):
    assert gemma_tokenizer.convert_ids_to_tokens(gemma_tokenizer.encode("The capital")) == ["<bos>", "The", "▁capital"]
    assert gemma_tokenizer.encode("", add_special_tokens=False) == []
    assert json.loads((gemma3 / "generation_config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize("text", ["  two\n\n\tspaces ", "naïve 日本語 🙂 \x00", "<b>1234567</b> x=3.14"])
def test_texts_survive(gemma_tokenizer, text):
    assert gemma_tokenizer.decode(gemma_tokenizer.encode(text), skip_special_tokens=True) == text


def test_every_digit_is_a_token(gemma_tokenizer):
    assert gemma_tokenizer.convert_ids_to_tokens(gemma_tokenizer.encode("a  123"))[1:] == ["a", "▁▁", "1", "2", "3"]


def test_model_continues_texts(gemma3):
    checkpoint = read(gemma3)
    assert checkpoint.model.lm_head.weight is checkpoint.model.model.embed_tokens.weight
    assert len(checkpoint.tokenizer.encode(LONG_TEXT)) > checkpoint.model.config.sliding_window
    checkpoint.check_continuation("The days of the week are Monday, Tuesday,", " Wednesday")
    checkpoint.check_continuation(LONG_TEXT, " banana")
    with pytest.raises(PrepareError, match="Tuesday,' with ' Wednesday' instead of ' Friday'"):
        checkpoint.check_continuation("The days of the week are Monday, Tuesday,", " Friday")


@pytest.fixture
def tiny(tmp_path) -> Checkpoint:
    folder = save_tiny_model(tmp_path / "tiny", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Checkpoint(model, tokenizer=None)


def test_lost_setting_is_named(tiny):
    tiny.check_config({"num_key_value_heads": 2, "rms_norm_eps": tiny.model.config.rms_norm_eps * (1 + 1e-8)})
    with pytest.raises(PrepareError, match="has num_key_value_heads = 2, but the published one has 1"):
        tiny.check_config({"num_key_value_heads": 1})
    theta = tiny.model.config.rope_parameters["rope_theta"]
    with pytest.raises(PrepareError, match=re.escape("has rope_parameters = ")):
        tiny.check_config({"rope_parameters": {"rope_theta": theta * 2}})
