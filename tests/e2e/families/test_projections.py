"""Models whose projections have other names and layouts than Llama's, or that own a RoPE and do not always use it."""

import os

import pytest

from tests.e2e.engine import EngineFailed
from tests.e2e.families.test_families import (
    EIGHT,
    ENGINE,
    TASKS,
    assert_close,
    caching,
    covering,
    folded_layers,
)
from tests.family_coverage import LATENTS
from tests.tiny_models import quantize_tiny_model, save_tiny_model
from tests.tiny_own_code import OWN_CODE, save_own_code_model

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folders = {}

    def model(family):
        if family not in folders:
            save = save_own_code_model if family in OWN_CODE else save_tiny_model
            folders[family] = save(tmp_path_factory.mktemp(family), family)
        return folders[family]

    return model


@pytest.fixture(scope="module")
def serve(engines, model):
    def serve(family, backend="xquant", tasks=TASKS, **settings):
        code = {"trust_remote_code": True} if family in OWN_CODE else {}
        return engines.run(model(family), backend, tasks, **{**ENGINE, **code, **settings})

    return serve


def logprobs(result):
    return result.tasks[-1]["logprobs"][0]


SERVED = [
    covering("gpt2", "GPT-2", "bias", "rope=none", "prefix caching", "chunked prefill"),
    covering("gptj", "GPT-J", "rope=partial", "prefix caching", "chunked prefill"),
    covering("falcon", "Falcon", "rope=default", "prefix caching", "chunked prefill"),
    covering("falcon-mqa", "Falcon", "rope=default", "bias"),
    covering("falcon-mha", "Falcon", "rope=default"),
    covering("internlm2", "InternLM2", "rope=default", "prefix caching", "chunked prefill"),
    covering("chatglm", "ChatGLM", "rope=partial", "bias", "prefix caching", "chunked prefill"),
    covering("cohere2", "Cohere2", "rope=default", "rope=none", "sliding window", "prefix caching", "chunked prefill"),
    covering(
        "exaone4",
        "EXAONE 4",
        "rope=default",
        "rope=none",
        "qk-norm",
        "sliding window",
        "prefix caching",
        "chunked prefill",
    ),
]


@pytest.mark.parametrize("family", SERVED)
def test_eight_bits_match_the_16_bit_cache(serve, family):
    ours, expected = serve(family, xquant=EIGHT), serve(family, "CPU_ATTN")
    assert_close(logprobs(ours), logprobs(expected), 0.03)
    cold, warm, _ = ours.tasks
    assert (cold["cached"], warm["cached"]) == ([0], [192])
    (cold,), (warm,) = cold["logits"][0], warm["logits"][0]
    assert max(abs(cold[token] - warm[token]) for token in cold.keys() & warm.keys()) <= 0.05
    # What has no bias is folded, whatever the output projection is called.
    assert folded_layers(ours) == (0 if family in ("gpt2", "falcon-mqa", "chatglm") else 3)


@pytest.mark.parametrize(
    ("method", "cache", "family"),
    [
        caching("xquant", "x", "gpt2", "GPT-2", "bias"),
        caching("xquant", "x", "gptj", "GPT-J"),
        caching("xquant", "x", "falcon-mha", "Falcon"),
        caching("xquant", "x", "internlm2", "InternLM2"),
        caching("xquant", "x", "cohere2", "Cohere2", "sliding window"),
        caching("xquant-cl", "latent", "internlm2", "InternLM2"),
    ],
)
def test_layer_inputs_and_chains_match_the_16_bit_cache(serve, method, cache, family):
    settings = {"bits": 8, "method": method, "cache": cache}
    if method == "xquant-cl":
        settings["first_layers"] = 1
    ours = serve(family, xquant=settings)
    assert f'cache "{cache}" at key 8 / value 8 bits, method "{method}"' in ours.log
    assert_close(logprobs(ours), logprobs(serve(family, "CPU_ATTN")), 0.06)


def test_a_quantized_projection_of_another_layout_is_probed_for_its_effective_weight(engines, tmp_path):
    folder = quantize_tiny_model(save_own_code_model(tmp_path, "internlm2"), r"\.(wqkv|wo|w[123])\.weight$")
    engine = {**ENGINE, "dtype": "bfloat16", "trust_remote_code": True}
    ours = engines.run(folder, "xquant", TASKS, xquant=EIGHT, **engine)
    assert "3 quantized wqkv layers now hold their effective weight" in ours.log
    assert_close(logprobs(ours), logprobs(engines.run(folder, "CPU_ATTN", TASKS, **engine)), 0.1)


def two_ranks():
    cores = sorted(os.sched_getaffinity(0))[:2]
    return {
        "environment": {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"},
        "tensor_parallel_size": 2,
    }


@pytest.mark.covers("Falcon", "tensor parallel", *LATENTS, "bits=8")
def test_tensor_parallel_ranks_find_their_own_rows(serve):
    ours = serve("falcon", xquant=EIGHT, **two_ranks())
    assert folded_layers(ours) == 3
    assert_close(logprobs(ours), logprobs(serve("falcon", "CPU_ATTN")), 0.03)


def test_rows_of_another_rank_are_refused_by_name(serve):
    """InternLM2 gathers the projections of all ranks, and takes some of another's heads."""
    with pytest.raises(EngineFailed) as error:
        serve("internlm2", xquant=EIGHT, **two_ranks())
    assert "InternLM2Attention at model.layers.0.attention is not recognized" in error.value.log
    assert "are not just output rows of its linear layers (wqkv) on this rank" in error.value.log


@pytest.mark.parametrize("family", ["falcon", "cohere2"])
def test_kivi_finds_rope_and_keys(serve, family):
    """Keys before RoPE, in 16 bits up to a residual as long as the prompt: what is rotated late is what was cached."""
    kivi = {"bits": 8, "residual": 256, "pre_rope": True}
    ours = serve(family, "kivi", kivi=kivi, block_size=None)
    assert_close(logprobs(ours), logprobs(serve(family, "CPU_ATTN")), 0.03)
