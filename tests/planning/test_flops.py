"""Extra FLOPs are those of the cost model on paper, which counts keys, scores and values one by one."""

import pytest

from benchmarks.cost.caches import LLAMA_3, WORDS, kv_cache, latent_cache
from tests.planning.models import config_folder, serving
from xquant_vllm.planning.caches import Kind, pages
from xquant_vllm.planning.flops import extra_flops
from xquant_vllm.planning.model_files import read_model
from xquant_vllm.planning.planned_model import planned_model


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Kind("xquant", 4), {}),
        (Kind("joint", 4), {"basis": "joint"}),
        (Kind("x", 4), {"cache": "x"}),
    ],
)
def test_they_agree_with_the_cost_model(tmp_path, kind, settings):
    folder = config_folder(
        tmp_path,
        hidden_size=LLAMA_3.hidden_size,
        num_attention_heads=LLAMA_3.heads,
        num_key_value_heads=LLAMA_3.kv_heads,
        num_hidden_layers=LLAMA_3.layers,
    )
    made = pages(kind, planned_model(read_model(folder)), serving())
    ours, plain = latent_cache("", LLAMA_3, WORDS, bits=4, **settings), kv_cache(LLAMA_3, 16)
    expected = LLAMA_3.layers * (sum(ours.flops()) - sum(plain.flops()))
    assert extra_flops(made.formats, LLAMA_3.heads) == pytest.approx(expected)


def test_keys_and_values_cost_nothing():
    assert extra_flops((), 32) == 0
