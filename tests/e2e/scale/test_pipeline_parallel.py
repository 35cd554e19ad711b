"""Two ranks of a pipeline, each with half of the layers.

vLLM's runner for CPUs makes the buffer that a later rank receives into while it warms the model up, and leaves that out
with ``--enforce-eager``. So these engines trace the model, without compiling it.
"""

import pytest

from tests.e2e.engine import EngineFailed
from tests.e2e.scale.conftest import distance, tokens
from xquant_vllm.offline.factorize import factorize
from xquant_vllm.offline.factorize_options import FactorizeOptions

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

STAGES = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}


@pytest.fixture(scope="module")
def model(ranks):
    """Layers 0 to 2 and 3 to 5."""
    return ranks.model("qwen3", 6)


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        # What is skipped is counted from the model's first layer.
        (
            {"bits": 8, "cache": "latent", "skip_layers": [4]},
            [
                "3 layers hold latents of keys and values at key 8 / value 8 bits",
                "2 layers hold latents of keys and values at key 8 / value 8 bits",
                "1 layers hold latents of keys and values at key 16 / value 16 bits",
            ],
        ),
        ({"bits": 8, "cache": "x"}, ["3 layers hold the layer input at 8 bits"] * 2),
        # Layers 0 and 4 are anchors, and layer 3, which is the first on its rank. It rounds other numbers than with the
        # one rank, so only 16 bits answer the same.
        (
            {"bits": 16, "method": "xquant-cl", "cache": "latent"},
            [
                "1 layers hold joint latents of keys and values at 16 bits",
                "2 layers hold differences of joint latents of keys and values at 16 bits",
                "2 layers hold joint latents of keys and values at 16 bits",
                "1 layers hold differences of joint latents of keys and values at 16 bits",
            ],
        ),
    ],
    ids=["latents", "X", "chain"],
)
def test_two_stages_answer_like_one_rank(ranks, model, settings, lines):
    two = ranks.several(model, xquant=settings, **STAGES, **TRACED)
    one = ranks.one(model, xquant=settings)
    exact = ranks.one(model, "CPU_ATTN")
    assert distance(two, exact) <= 0.06
    assert distance(two, one) <= 2e-3
    assert tokens(two) == tokens(one)
    for line in {*lines}:
        assert two.log.count(f"xquant: {line}") == lines.count(line)
    for layers in ("0-2", "3-5"):
        assert two.log.count(f"xquant: layers {layers} are compressed, which is all of this rank") == 1
    # As much memory for half of the layers; the skipped layer makes the second rank the fuller one.
    assert two.cache_tokens > 1.4 * one.cache_tokens


def test_a_folder_of_factors(ranks, model, tmp_path):
    folder = tmp_path / "factors"
    factorize(FactorizeOptions(model, folder, dtype="float32", bits=8))
    latents = {"cache": "latent"}
    two = ranks.several(folder, xquant=latents, **STAGES, **TRACED)
    assert two.log.count(f"factors read from {folder}") == 2
    assert distance(two, ranks.one(folder, xquant=latents)) <= 2e-3


def test_vllms_runner_for_cpus_needs_the_warm_up(ranks, model):
    """So that the refusal is not this package's alone; it can go when this fails."""
    with pytest.raises(EngineFailed, match=r"assert self\.intermediate_tensors is not None"):
        ranks.several(model, "CPU_ATTN", **STAGES)
