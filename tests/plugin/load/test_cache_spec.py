"""What vLLM's allocator and the log are told about layers."""

from contextlib import nullcontext

import pytest
import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from tests.plugin.test_checks import configure
from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.load.cache_spec import fill_page, refuse_mixed_pages
from xquant_vllm.plugin.load.coverage import ranges


@pytest.mark.parametrize(
    ("block_size", "bytes_per_token", "other_page_bytes", "expected"),
    [
        (128, 100, 0, 128),
        (128, 100, 12800, 128),
        (128, 100, 12800 * 1.49, 128),
        (128, 100, 12800 * 1.73, 192),
        (128, 100, 12800 * 3.05, 384),
        # Half a block of 16 tokens could not be aligned.
        (16, 100, 1600 * 1.73, 16),
        (16, 100, 1600 * 2.1, 32),
        # Larger than the others': theirs are padded.
        (128, 100, 6400, 128),
    ],
)
def test_blocks_fill_the_pages_of_other_layers(block_size, bytes_per_token, other_page_bytes, expected):
    assert fill_page(block_size, block_size * bytes_per_token, int(other_page_bytes)) == expected


def test_layers_are_named_in_runs():
    assert ranges([5, 0, 1, 3, 4]) == "0-1, 3-5"
    assert ranges([7]) == "7"
    assert ranges([]) == ""


class Layer(AttentionLayerBase):
    """A layer as far as vLLM's allocator looks at it."""

    def __init__(self, spec):
        self.spec = spec

    def get_attn_backend(self):
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config):
        return self.spec


def spec(head_size, window=None):
    sizes = {"block_size": 32, "num_kv_heads": 2, "head_size": head_size, "dtype": torch.bfloat16}
    return FullAttentionSpec(**sizes) if window is None else SlidingWindowSpec(**sizes, sliding_window=window)


@pytest.mark.parametrize(
    ("specs", "served"),
    [
        ([spec(64), spec(32)], True),
        ([spec(64, 48), spec(32, 48)], True),
        ([spec(64, 48), spec(64)], True),
        ([spec(64, 48), spec(32)], False),
        ([spec(64), spec(64, 48), spec(32)], False),
    ],
)
def test_pages_of_a_draft_have_any_size_beside_layers_that_keep_the_same_tokens(tmp_path, specs, served):
    config = configure(str(save_tiny_model(tmp_path, "llama")))
    config.compilation_config.static_forward_context.update({str(i): Layer(spec) for i, spec in enumerate(specs)})
    refusal = pytest.raises(UnsupportedError, match=r"not supported for LlamaForCausalLM .* draft by ngram$")
    with nullcontext() if served else refusal:
        refuse_mixed_pages(config)
