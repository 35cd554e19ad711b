"""benchmarks/cost_model.py, rope_absorption.py: they count what the package stores; docs/kernels-gpu.md shows it."""

import cmath
import math
from pathlib import Path

import pytest

from benchmarks import cost_model, rope_absorption
from benchmarks.cost_caches import LLAMA_2, LLAMA_3, SMOLLM2, TABLE, Cache, Model, allocation, caches, kv_cache
from benchmarks.cost_model import H100, H200, ROOT, roofs, time
from benchmarks.rope_absorption import ROPES, Rope, absorbable, bound, products
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import PageLayout, StreamFormat

PAGE = ROOT / "docs" / "kernels-gpu.md"


def _cache(model: Model, name: str) -> Cache:
    return next(cache for cache in caches(model) if cache.name == name)


@pytest.mark.parametrize("made", [*cost_model.tables(), *rope_absorption.tables()], ids=lambda text: text[2:20])
def test_the_page_shows_what_the_scripts_print(made):
    assert made in PAGE.read_text(), "print the tables with both scripts and put them into docs/kernels-gpu.md"


def test_pages_link_to_the_page():
    assert "docs/kernels-gpu.md" in (ROOT / "README.md").read_text()
    assert "(kernels-gpu.md)" in (ROOT / "docs" / "kernels.md").read_text()


def test_files_that_the_page_links_to_are_there():
    names = [part.split(")")[0] for part in PAGE.read_text().split("](")[1:]]
    assert names
    assert not [name for name in names if not Path(PAGE.parent, name.split("#")[0]).is_file()]


@pytest.mark.parametrize(
    ("model", "name", "streams"),
    [
        (SMOLLM2, "per head, 4 bits", (StreamFormat(3, 64, 4, 64, 1), StreamFormat(3, 64, 4, 64))),
        (LLAMA_3, "per head, 4 bits", (StreamFormat(8, 128, 4, 128, 1), StreamFormat(8, 128, 4, 128))),
        (LLAMA_3, "joint, 4 bits", (StreamFormat(1, 1024, 4, 128, 1), StreamFormat(1, 1024, 4, 128))),
        (LLAMA_2, "X, 4 bits", (StreamFormat(1, 4096, 4, 128),)),
        (LLAMA_2, "int4 KV", (StreamFormat(32, 128, 4, 128), StreamFormat(32, 128, 4, 128))),
    ],
)
def test_bytes_are_those_of_the_page_layout(model, name, streams):
    assert _cache(model, name).stored == pytest.approx(PageLayout(streams, 16).bytes_per_token)


def test_bytes_of_calibrated_streams_are_those_of_the_page_layout():
    streams = tuple(AllocatedFormat(128, runs) for runs in allocation(LLAMA_3, 2, joint=False))
    cache = _cache(LLAMA_3, "per head, calibrated 2")
    assert cache.stored == pytest.approx(PageLayout(streams, 16).bytes_per_token)
    # A budget of 2 bits per channel, and what the paper spends on scales and zero points.
    assert 0.95 * 576 <= cache.stored <= 576


def test_plain_caches_take_two_bytes_and_one():
    assert kv_cache(LLAMA_3, 16).stored == 2 * 2 * 1024
    assert kv_cache(LLAMA_3, 8).stored == 2 * 1024


def test_a_chain_of_x_reads_all_layers_back_to_its_anchor():
    cache = _cache(LLAMA_2, "chain of X, 2 bits")
    # Anchors (2,176 bytes at 4 bits) every 4 layers, differences (1,152) between them.
    assert cache.stored == pytest.approx((2176 + 3 * 1152) / 4)
    assert cache.read == pytest.approx((4 * 2176 + 6 * 1152) / 4)
    assert cache.key_width == pytest.approx(4096 * 2.5)


def test_flops_by_hand():
    per_head = _cache(LLAMA_3, "per head, 4 bits").flops(query_len=2)
    assert per_head.keys == 8 * 2 * 128 * 128
    assert per_head.scores == per_head.values == 8 * 2 * (2 * 4) * 128
    # Rows are padded, and X has its values rematerialized.
    x = _cache(LLAMA_2, "X, 4 bits").flops(multiple=16)
    assert x.scores == 32 * 2 * 16 * 128
    assert x.values == 32 * 2 * 4096 * 128 + x.scores
    assert x.keys == 32 * 2 * 4096 * 128


def test_16_bits_are_bound_by_memory_and_latents_per_head_by_table_by_unpacking():
    plain, latents = _cache(LLAMA_3, "16-bit KV"), _cache(LLAMA_3, "per head, 4 bits")
    assert time(plain, H100).least == pytest.approx(4096 / (0.8 * 3.35e12))
    assert time(plain, H200).least == pytest.approx(4096 / (0.8 * 4.8e12))
    of = roofs(latents, H100)
    assert max(of, key=of.__getitem__) == "vector"
    # 8 heads x 256 channels at 5 integer instructions on 64 lanes, 132 SMs; keys and softmax after that.
    assert latents.unpack == TABLE
    assert of["vector"] > 2048 * 5 / 64 / 132 / 1.83e9
    assert time(latents, H100).most > time(latents, H100).least


def test_llama_3_scaling_leaves_fast_pairs_and_slows_slow_ones():
    scaled = ROPES[0].frequencies()
    plain = Rope("", 128, 500_000.0).frequencies()
    assert scaled[0] == plain[0] == 1.0
    assert scaled[-1] == pytest.approx(plain[-1] / 8)
    ratios = [a / b for a, b in zip(scaled, plain, strict=True)]
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.name)
def test_the_bound_holds_everywhere_in_a_block(rope, block, order):
    for frequency in rope.frequencies():
        for delta in range(-block // 2, block // 2 + 1):
            angle = -1j * frequency * delta
            expansion = sum(angle**power / math.factorial(power) for power in range(order + 1))
            assert abs(cmath.exp(angle) - expansion) <= bound(frequency, block, order) * (1 + 1e-9) + 1e-14


def test_absorbable_pairs_and_their_products_by_hand():
    # theta B/2 <= 0.01, with theta = 100000 ** (-pair / 32): pair >= 32 log(800) / log(100000) = 18.58.
    assert absorbable(ROPES[2], 16, 0, 1e-2) == 32 - 19
    assert products(ROPES[1], 128, 0, 32, 1, 4) == pytest.approx(1.0)
    # Half of the channels rematerialized, 4 queries in 2 orders, absorbed once per 64 tokens.
    assert products(ROPES[1], 128, 32, 64, 1, 4) == pytest.approx((64 * 132 + 8 * 128 * 2) / (128 * 132))
