"""Multimodal RoPE where all positions of a token are equal: plain RoPE, and positions that no request can move."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import Ernie4_5_VLRotaryEmbedding

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.modules import QueryOnlyRotary
from xquant_vllm.plugin.load.rope.positions import keep_text_positions, on_all_axes, position_axes
from xquant_vllm.plugin.load.rope.tables import read_rope
from xquant_vllm.projection.rope import apply_rope

HEAD_SIZE, LENGTH = 64, 128
VARIANTS = {
    "chunked": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    "interleaved": {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True},
    "partial": {"rope_type": "default", "mrope_section": [8, 4, 4], "partial_rotary_factor": 0.5},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "mrope_section": [8, 12, 12]},
    "bailing": {"rope_type": "bailing_mrope", "mrope_section": [8, 12, 12]},
    "openpangu": {"rope_type": "openpangu", "mrope_section": [8, 12, 12], "mrope_interleaved": True},
}


@pytest.fixture(params=[*VARIANTS, "ernie"])
def rotary(request):
    with set_current_vllm_config(VllmConfig()):
        get_rope.__globals__["_ROPE_DICT"].clear()
        if request.param == "ernie":
            section = {"mrope_section": [12, 12, 8]}
            return Ernie4_5_VLRotaryEmbedding(HEAD_SIZE, HEAD_SIZE, LENGTH, 1e4, False, torch.float32, **section)
        parameters = {"rope_theta": 1e4, **VARIANTS[request.param]}
        return get_rope(HEAD_SIZE, max_position=LENGTH, rope_parameters=parameters, dtype=torch.float32)


@pytest.mark.parametrize("heads", [1, 3])
def test_equal_positions_turn_keys_as_the_table_does_and_queries_alone(rotary, heads):
    places = torch.arange(LENGTH)
    query, key = torch.randn(2, LENGTH, heads, HEAD_SIZE)
    positions = on_all_axes(places, 3)
    assert positions.shape == (3, LENGTH)
    turned_query, turned_key = rotary(positions, query.flatten(1).clone(), key.flatten(1).clone())
    table = read_rope("layer", rotary, LENGTH)
    torch.testing.assert_close(apply_rope(key, places, table).flatten(1), turned_key, atol=2e-5, rtol=0)
    alone, passed = QueryOnlyRotary(rotary)(positions, query.flatten(1).clone(), key)
    assert passed is key
    torch.testing.assert_close(alone, turned_query, atol=0, rtol=0)


def test_one_position_per_token_stays_as_it_is():
    places = torch.arange(5)
    assert on_all_axes(places, 0) is places
    assert position_axes(SimpleNamespace(uses_mrope=False)) == 0
    assert position_axes(SimpleNamespace(uses_mrope=True, mrope_num_dims=4)) == 4


class _Model:
    """A model that tells positions by a rule."""

    def __init__(self, rule):
        self.get_mrope_input_positions = rule


def _text(tokens, features):
    """As Qwen2-VL does: the images move what is behind them."""
    return torch.arange(len(tokens)).repeat(3, 1) + 7 * len(features), 7 * len(features)


def _config(*, images=False):
    model = SimpleNamespace(uses_mrope=True, mrope_num_dims=3, architecture="SomeForCausalLM", model="/model")
    model.supports_multimodal_inputs, model.multimodal_config = images, None
    return SimpleNamespace(model_config=model)


CONFIG = _config()


def test_features_of_images_cannot_move_positions():
    model = _Model(_text)
    assert model.get_mrope_input_positions([5] * 9, ["image"])[1] == 7
    keep_text_positions(model, CONFIG)
    positions, delta = model.get_mrope_input_positions([5] * 9, ["image"])
    assert delta == 0
    assert torch.equal(positions, torch.arange(9).repeat(3, 1))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (SimpleNamespace(), "does not tell the positions"),
        (_Model(lambda tokens, _: (torch.arange(len(tokens)).repeat(3, 1) + 1, 0)), "other positions than their place"),
        (_Model(lambda tokens, _: (torch.arange(len(tokens)).repeat(3, 1), 1)), "other positions than their place"),
        (_Model(lambda tokens, _: (torch.arange(len(tokens)).repeat(2, 1), 0)), "other positions than their place"),
    ],
)
def test_models_that_place_text_otherwise_are_refused_by_name(model, named):
    with pytest.raises(UnsupportedError, match=rf"SomeForCausalLM \(/model\) uses multimodal RoPE.*{named}"):
        keep_text_positions(model, CONFIG)


@pytest.mark.parametrize("backend", ["XQUANT", "KIVI"])
def test_classes_that_turn_out_to_have_it_once_they_are_built_are_refused_with_images(backend):
    model = _Model(_text)
    named = rf"{backend.lower()}: SomeForCausalLM .* several positions per token .* with --language-model-only, or"
    with pytest.raises(UnsupportedError, match=named):
        keep_text_positions(model, _config(images=True), backend)
    assert model.get_mrope_input_positions is _text


def test_models_without_it_are_left_alone():
    keep_text_positions(SimpleNamespace(), SimpleNamespace(model_config=SimpleNamespace(uses_mrope=False)))
