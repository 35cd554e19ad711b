"""Tiles of prefill fit every GPU."""

import pytest
import torch

from xquant_vllm.attention.gpu.limits import SHARED_MEMORY
from xquant_vllm.attention.gpu.prefill.tiles import bytes_of_tile, dense_tile


@pytest.mark.parametrize("shared", sorted(set(SHARED_MEMORY.values())))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_fits(width: int, dtype: torch.dtype, shared: int) -> None:
    assert bytes_of_tile(dense_tile(width, dtype, shared), width, dtype) <= shared


def test_larger_on_larger_gpus() -> None:
    small, large = (dense_tile(256, torch.bfloat16, shared) for shared in (101376, 232448))
    assert (small.queries, small.tokens) < (large.queries, large.tokens)


def test_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"float32 take 50,176 bytes .* this GPU has 20,000: set --dtype bfloat16"):
        dense_tile(256, torch.float32, 20000)
