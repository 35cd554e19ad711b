"""benchmarks/cost/model.py counts what the package stores and the suite counts; docs/kernels/cost.md shows it."""

from pathlib import Path

import pytest
import torch

from benchmarks.cost import model as cost_model
from benchmarks.cost.caches import (
    LLAMA_2,
    LLAMA_3,
    SMOLLM2,
    TABLE,
    TWO_PLANES,
    WORDS,
    Cache,
    Model,
    allocation,
    caches,
    kv_cache,
    latent_cache,
)
from benchmarks.cost.model import binding, clocks, roofs, time
from benchmarks.gpu import layers
from benchmarks.gpu.cost import attention_cost, cached_bytes, dense_attention_cost
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import PageLayout, StreamFormat

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernels" / "cost.md"


def _cache(model: Model, name: str) -> Cache:
    return next(cache for cache in caches(model) if cache.name == name)


@pytest.mark.parametrize("made", cost_model.tables(), ids=lambda text: text[2:20])
def test_the_page_shows_what_the_script_prints(made):
    assert made in PAGE.read_text(), "print the tables with benchmarks/cost/model.py into docs/kernels/cost.md"


def test_pages_link_to_the_page():
    assert "docs/kernels/cost.md" in (ROOT / "README.md").read_text()
    assert "(cost.md)" in (ROOT / "docs" / "kernels" / "cpu.md").read_text()


@pytest.mark.parametrize("page", ["cost.md", "triton.md", "gpu.md"])
def test_files_that_the_pages_link_to_are_there(page):
    names = [part.split(")")[0] for part in (PAGE.parent / page).read_text().split("](")[1:]]
    assert names
    files = [file for name in names if (file := name.split("#")[0])]
    assert not [file for file in files if not Path(PAGE.parent, file).is_file()]


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
    streams = tuple(AllocatedFormat(128, runs) for runs in allocation(LLAMA_3, 2))
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
    assert time(plain, "H100").least == pytest.approx(4096 / (0.8 * 3.35e12))
    assert time(plain, "H200").least == pytest.approx(4096 / (0.8 * 4.8e12))
    assert binding(latents, "H100") == "vector"
    # 8 heads x 256 channels at 5 integer instructions on 64 lanes, 132 SMs; keys and softmax after that.
    assert latents.unpack == TABLE
    assert roofs(latents, "H100")["vector"] > 2048 * 5 / 64 / 132 / 1.83e9
    assert time(latents, "H100").most > time(latents, "H100").least


@pytest.mark.parametrize(("unpack", "shown"), [(TABLE, "0.078"), (TWO_PLANES, "0.156"), (WORDS, "0.016")])
def test_clocks_of_unpacking_are_those_of_the_page(unpack, shown):
    assert f"{clocks(unpack):.3f}" == shown
    assert f"| {shown} | integer |" in PAGE.read_text()


# The suite's own layers, as small ones: it counts their bytes and FLOPs from a layer's plan, not from settings.
_SMALL = layers.Model("small", 512, 8, 2, 64)
_ON_PAPER = Model("small", 512, 8, 2, 64)


@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize("context", [1024, 4096])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_latents_cost_what_the_suite_counts(bits, context, query_len):
    plan = layers.make_layer(_SMALL, f"uniform {bits}", 16, 16, torch.device("cpu"), 0)
    outliers = {"outlier_channels": 0}
    cache = latent_cache("", _ON_PAPER, TABLE, bits=bits, **outliers)
    assert cache.stored == cached_bytes(plan)
    counted = attention_cost(plan, [context], [query_len]).flops
    # A query token does not see those of its own step that come after it.
    assert counted == pytest.approx(sum(cache.flops(query_len)) * context, rel=query_len / context)


@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize("model", [LLAMA_3, LLAMA_2, SMOLLM2], ids=lambda model: model.name)
def test_16_bits_cost_what_the_suite_counts(model, query_len):
    cache, context = kv_cache(model, 16), 4096
    counted = dense_attention_cost(model.heads, model.kv_heads, model.head_size, [context], [query_len])
    assert counted.flops == pytest.approx(sum(cache.flops(query_len)) * context, rel=query_len / context)
    queries = 2 * query_len * model.heads * model.head_size * 2
    assert counted.bytes == cache.read * context + queries
