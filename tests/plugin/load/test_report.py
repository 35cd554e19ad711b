"""What the log says of ranks, which each keep a part of the cache, or all of it."""

import pytest

from xquant_vllm.plugin.load.report import tensor_parallel
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.settings import parse_settings

HIDDEN, HEAD_SIZE = 128, 32


def lines(total_kv_heads, ranks, **settings):
    shapes = [LayerShape(0, HIDDEN, max(1, total_kv_heads // ranks), HEAD_SIZE)]
    return list(tensor_parallel(layer_formats(parse_settings(settings), shapes), ranks, total_kv_heads))


def test_one_rank_needs_no_words():
    assert lines(4, 1, cache="x") == []


@pytest.mark.parametrize(("kv_heads", "ranks", "own", "times"), [(4, 2, 128, 2), (4, 4, 64, 4), (2, 4, 64, 2)])
def test_x_is_whole_on_every_rank(kv_heads, ranks, own, times):
    """16 bit is cut into as many parts as there are kv heads, if ranks are more."""
    line = lines(kv_heads, ranks, cache="x")[-1]
    assert line == (
        f"with --tensor-parallel-size {ranks} every rank keeps the whole layer input, 128 channels instead of the "
        f"{own} of its own keys and values: the saving over 16 bit is {times} times smaller than on one rank"
    )


def test_one_kv_head_is_on_all_ranks_and_costs_x_nothing():
    copies, line = lines(1, 2, cache="x")
    assert copies == (
        "with --tensor-parallel-size 2 each of the model's kv heads (1) is on 2 ranks, which all keep what is cached "
        "of it, as they do with a 16-bit cache"
    )
    assert line.endswith("128 channels instead of the 64 of its own keys and values")


@pytest.mark.parametrize(
    ("kv_heads", "ranks", "said"),
    [
        (4, 2, ["so latents are cached"]),
        (4, 4, ["so latents are cached"]),
        (2, 2, []),
        (1, 2, ["kv heads (1) is on 2 ranks"]),
        (2, 8, ["kv heads (2) is on 4 ranks"]),
    ],
)
def test_latents_are_cut_with_the_heads(kv_heads, ranks, said):
    found = lines(kv_heads, ranks, cache="latent")
    assert len(found) == len(said)
    for line, part in zip(found, said, strict=True):
        assert part in line
