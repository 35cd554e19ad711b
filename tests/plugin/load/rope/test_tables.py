"""Reading the parts of a model: rotary tables as vLLM's modules turn keys, shared as vLLM shares the modules."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope, phi3_long_rope_scaled_rope

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.modules import QueryOnlyRotary
from xquant_vllm.plugin.load.rope.tables import read_rope
from xquant_vllm.projection.rope import apply_rope

HEAD_SIZE = 64
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.1 * i for i in range(32)],
    "long_factor": [1.0 + 0.5 * i for i in range(32)],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
}
# Parameters, and how many positions the module of a model with 256 max_position_embeddings knows.
VARIANTS = {
    "default": ({"rope_type": "default"}, 256),
    "partial": ({"rope_type": "default", "partial_rotary_factor": 0.5}, 256),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 512),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0, "max_trained_positions": 64}, 256),
    "alpha": ({"rope_type": "dynamic", "alpha": 100.0}, 256),
    "ntk": ({"rope_type": "ntk", "factor": 4.0}, 256),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        256,
    ),
    "yarn": ({"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}, 1024),
    "longrope": (LONGROPE, 256),
}


@pytest.fixture
def make(monkeypatch):
    def make(variant, max_model_len, dtype=torch.float32, **options):
        # LongRoPE reads the length of the model when it is built.
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
        monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: config)
        parameters = {"rope_theta": 1e4, **VARIANTS[variant][0]}
        with set_current_vllm_config(VllmConfig()):
            get_rope.__globals__["_ROPE_DICT"].clear()
            return get_rope(HEAD_SIZE, max_position=256, rope_parameters=parameters, dtype=dtype, **options)

    return make


def turn(rotary, positions, query, key):
    forward = getattr(rotary, "forward_native", rotary.forward)
    return forward(positions, query.flatten(1).clone(), key.flatten(1).clone())


def assert_turns_alike(rotary, table, positions):
    query, key = torch.randn(2, len(positions), 3, HEAD_SIZE)
    _, expected = turn(rotary, positions, query, key)
    torch.testing.assert_close(apply_rope(key, positions, table).flatten(1), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_position_is_turned_as_vllm_turns_it(make, variant):
    length = VARIANTS[variant][1]
    rotary = make(variant, length)
    table = read_rope("layer", rotary, length)
    assert table.cos.shape[0] == length
    assert_turns_alike(rotary, table, torch.arange(length))


def test_interleaved_pairs(make):
    rotary = make("default", 256, is_neox_style=False)
    assert_turns_alike(rotary, read_rope("layer", rotary, 256), torch.arange(256))


@pytest.mark.parametrize(("max_model_len", "factors"), [(64, "short"), (65, "long"), (256, "long")])
def test_longrope_takes_the_long_factors_beyond_the_original_length(make, max_model_len, factors):
    rotary = make("longrope", max_model_len)
    table = read_rope("layer", rotary, max_model_len)
    assert_turns_alike(rotary, table, torch.arange(max_model_len))
    frequency = 1 / (LONGROPE[f"{factors}_factor"][1] * 1e4 ** (1 / 32))
    scale = LONGROPE[f"{factors}_mscale"]
    assert table.cos[3, 1].item() == pytest.approx(scale * torch.tensor(3 * frequency).cos().item(), abs=1e-6)


def test_longrope_turns_queries_alone(make):
    rotary = make("longrope", 256)
    positions = torch.arange(0, 256, 16)
    query, key = torch.randn(2, len(positions), 3, HEAD_SIZE).flatten(2)
    expected, _ = rotary(positions, query, key)
    turned, passed = QueryOnlyRotary(rotary)(positions, query, key)
    assert passed is key
    torch.testing.assert_close(turned, expected, atol=0, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_longer_than_their_table_are_refused_with_its_length(make, variant):
    known = VARIANTS[variant][1]
    with pytest.raises(
        UnsupportedError, match=rf"layer knows {known} positions .* set --max-model-len {known} or less"
    ):
        read_rope("layer", make(variant, known + 1), known + 1)


def test_positions_that_are_never_served_are_left_out(make):
    rotary = make("yarn", 100)
    table = read_rope("layer", rotary, 100)
    assert table.cos.shape == table.sin.shape == (100, 32)
    assert table.cos.untyped_storage().nbytes() == 100 * 32 * 4


def test_layers_that_share_a_rotary_module_share_its_table(make):
    rotary = make("default", 256)
    assert read_rope("first", rotary, 256) is read_rope("second", rotary, 256)
    assert read_rope("of another model", rotary, 128).cos.shape[0] == 128


@pytest.mark.parametrize("variant", ["default", "longrope"])
def test_the_table_is_taken_before_its_rounding_to_the_models_dtype(make, variant):
    exact, rounded = make(variant, 256), make(variant, 256, dtype=torch.bfloat16)
    table = read_rope("layer", rounded, 256)
    assert table.cos.dtype == torch.float32
    assert torch.equal(table.cos, read_rope("layer", exact, 256).cos)
    assert not torch.equal(table.cos, table.cos.bfloat16().float())
