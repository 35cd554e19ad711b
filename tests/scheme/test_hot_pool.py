"""The pool of hot blocks: which caches have one by default, and how large it is."""

import pytest

from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.hot_pool import PageNeeds, pool_share, pool_tokens, wanted_bytes
from xquant_vllm.scheme.hot_share import DEFAULT_SHARE
from xquant_vllm.scheme.settings import parse_settings


@pytest.mark.parametrize(
    ("raw", "share"),
    [
        ({"cache": "latent"}, 0),
        ({"cache": "latent", "basis": "joint"}, DEFAULT_SHARE),
        ({"method": "xquant-cl", "cache": "latent"}, DEFAULT_SHARE),
        ({"cache": "x"}, DEFAULT_SHARE),
        ({"method": "xquant-cl"}, DEFAULT_SHARE),
        ({"cache": "latent", "hot": 0.5}, 0.5),
        ({"cache": "x", "hot": 0}, 0),
    ],
)
def test_default(raw, share):
    settings = parse_settings(raw)
    formats = layer_formats(settings, [LayerShape(i, 192, 3, 64) for i in range(4)])
    assert pool_share(settings.hot, formats) == share


def test_what_nobody_asked_for_leaves_pages_for_one_sequence():
    needs = PageNeeds(block_bytes=100, sequence_blocks=7, max_model_len=896)
    assert wanted_bytes(0.5, 1000, needs.least) == 200
    assert wanted_bytes(0.5, 1000, None) == 500
    assert wanted_bytes(0.5, 700, needs.least) == 0


def test_a_pool_has_two_blocks_or_is_none():
    assert pool_tokens(256 * 10, 10, 128) == 256
    assert pool_tokens(256 * 10 - 1, 10, 128) == 0
