"""Models whose projections have other names and layouts than Llama's, or that own a RoPE and do not always use it."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.engine import EngineFailed
from tests.e2e.families.test_families import (
    EIGHT,
    ENGINE,
    PROMPT,
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


# Whose 16-bit cache is as far from transformers as these bounds.
OTHERWISE_IN_VLLM = ("cohere2",)


@pytest.fixture(scope="module")
def expected(serve, model):
    """Log-probabilities of the prompt, by transformers if that is the same (no engine is needed), else in 16 bit."""
    known = {}

    def expected(family):
        if family not in known:
            by_vllm = family in OWN_CODE or family in OTHERWISE_IN_VLLM
            known[family] = logprobs(serve(family, "CPU_ATTN")) if by_vllm else transformers_logprobs(model(family))
        return known[family]

    return expected


def transformers_logprobs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).flatten().tolist()


CACHED = ("prefix caching", "chunked prefill")
SERVED = [
    covering("gpt2", "GPT-2", "bias", "rope=none", *CACHED),
    covering("gptj", "GPT-J", "rope=partial", *CACHED),
    covering("falcon", "Falcon", "rope=default", *CACHED),
    covering("internlm2", "InternLM2", "rope=default", *CACHED),
    covering("chatglm", "ChatGLM", "rope=partial", "bias", *CACHED),
    covering("cohere2", "Cohere2", "rope=default", "rope=none", "sliding window", *CACHED),
    covering("exaone4", "EXAONE 4", "rope=default", "rope=none", "qk-norm", "sliding window", *CACHED),
]


@pytest.mark.alike(keep=2)
@pytest.mark.parametrize("family", SERVED)
def test_eight_bits_match_the_model(serve, expected, family):
    ours = serve(family, xquant=EIGHT)
    assert_close(logprobs(ours), expected(family), 0.03)
    cold, warm, _ = ours.tasks
    assert (cold["cached"], warm["cached"]) == ([0], [192])
    (cold,), (warm,) = cold["logits"][0], warm["logits"][0]
    assert max(abs(cold[token] - warm[token]) for token in cold.keys() & warm.keys()) <= 0.05
    # What has no bias is folded, whatever the output projection is called.
    assert folded_layers(ours) == (0 if family in ("gpt2", "chatglm") else 3)


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize(
    ("method", "cache", "family"),
    [
        # A bias that the model adds by itself, one kv head.
        caching("xquant", "x", "falcon-mqa", "Falcon", "rope=default", "bias"),
        # Rows of keys between rows of queries.
        caching("xquant", "x", "internlm2", "InternLM2"),
        pytest.param("xquant-cl", "latent", "internlm2", marks=pytest.mark.nightly),
    ],
)
def test_layer_inputs_and_chains_match_the_model(serve, expected, method, cache, family):
    settings = {"bits": 8, "method": method, "cache": cache}
    if method == "xquant-cl":
        settings["first_layers"] = 1
    ours = serve(family, xquant=settings)
    assert f'cache "{cache}" at key 8 / value 8 bits, method "{method}"' in ours.log
    assert_close(logprobs(ours), expected(family), 0.06)


@pytest.mark.nightly
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
@pytest.mark.nightly
def test_tensor_parallel_ranks_find_their_own_rows(serve, expected):
    ours = serve("falcon", xquant=EIGHT, **two_ranks())
    assert folded_layers(ours) == 3
    assert_close(logprobs(ours), expected("falcon"), 0.03)


@pytest.mark.nightly
def test_rows_of_another_rank_are_refused_by_name(serve):
    """InternLM2 gathers the projections of all ranks, and takes some of another's heads."""
    with pytest.raises(EngineFailed) as error:
        serve("internlm2", xquant=EIGHT, **two_ranks())
    assert "InternLM2Attention at model.layers.0.attention is not recognized" in error.value.log
    assert "are not just output rows of its linear layers (wqkv) on this rank" in error.value.log


def test_kivi_rotates_keys_only_where_the_model_does(serve, expected):
    """Keys before RoPE, as the model computed them up to a residual as long as the prompt."""
    ours = serve("cohere2", "kivi", kivi={"bits": 4, "residual": 256, "pre_rope": True}, block_size=None)
    assert_close(logprobs(ours), expected("cohere2"), 0.03)
