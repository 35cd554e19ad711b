"""Reading the parts of a model: what vLLM shares between layers stays shared."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from xquant_vllm.integration.recognize import _read_rope


@pytest.fixture
def rotary():
    with set_current_vllm_config(VllmConfig()):
        parameters = {"rope_theta": 1e4, "rope_type": "default"}
        return get_rope(64, max_position=256, rope_parameters=parameters, dtype=torch.bfloat16)


def test_layers_that_share_a_rotary_module_share_its_table(rotary):
    assert _read_rope("first", rotary) is _read_rope("second", rotary)


def test_the_table_is_taken_before_its_rounding_to_the_models_dtype(rotary):
    table = _read_rope("layer", rotary)
    angles = torch.arange(256).float()[:, None] * 1e4 ** (-torch.arange(32).float() / 32)
    assert table.cos.dtype == torch.float32
    assert torch.allclose(table.cos, angles.cos(), atol=1e-4)
    assert torch.allclose(table.sin, angles.sin(), atol=1e-4)
    assert not torch.equal(table.cos, rotary.cos_sin_cache.float()[:, :32])
