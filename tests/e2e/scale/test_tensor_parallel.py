"""Two ranks of tensor parallelism answer what one does, and the log says what each of them keeps.

Latents per head are in ``tests/e2e/families/test_families.py``, folders of factors in ``tests/e2e/offline``.
"""

import re

import pytest

from tests.e2e.engine import EngineFailed
from tests.e2e.scale.conftest import HERE, distance, search_path, tokens

pytestmark = pytest.mark.e2e

X = {"bits": 8, "cache": "x"}
CHAIN = {"bits": 8, "method": "xquant-cl"}
# Model, settings, and tokens on two ranks for one on one.
CASES = [
    pytest.param("mha", X, 1, id="X", marks=pytest.mark.nightly),
    pytest.param("mha", {**CHAIN, "cache": "x"}, 1, id="chain of X", marks=pytest.mark.nightly),
    # A rank's joint latents are of its own heads, so it rounds other numbers than one rank does: only 16 bits answer
    # the same.
    pytest.param("qwen3", {**CHAIN, "cache": "latent", "bits": 16}, 2, id="chain", marks=pytest.mark.nightly),
    pytest.param("mqa", {"bits": 8, "cache": "latent"}, 1, id="one kv head", marks=pytest.mark.nightly),
]


def pool_tokens(log):
    return [int(n.replace(",", "")) for n in re.findall(r"keep the keys and values of up to ([\d,]+) tokens", log)]


def pages_say(log):
    """What vLLM, and what the summary says that pages hold."""
    return re.findall(r"KV cache size: ([\d,]+) tokens", log), re.findall(r"pages hold ([\d,]+) tokens", log)


@pytest.mark.parametrize(("model", "settings", "times"), CASES)
def test_two_ranks_answer_like_one(ranks, model, settings, times):
    two = ranks.several(model, xquant=settings, tensor_parallel_size=2, distributed_executor_backend="mp")
    one = ranks.one(model, xquant=settings)
    assert distance(two, one) <= 2e-3
    assert distance(two, ranks.one(model, "CPU_ATTN")) <= 0.06
    assert tokens(two) == tokens(one)
    assert two.tasks[3]["cached"] == one.tasks[3]["cached"]
    # A rank has as much memory for its part as the one for all.
    assert two.cache_tokens == pytest.approx(times * one.cache_tokens, rel=0.01)
    by_vllm, by_pool = pages_say(two.log)
    assert by_vllm == [f"{two.capacity:,}"]
    assert set(by_pool) <= set(by_vllm)
    assert two.log.count("bytes per token on this rank") == 1
    assert "on this rank" not in one.log


# Minutes; tests/e2e/families has ranks by default.
@pytest.mark.nightly
def test_ranks_keep_x_whole_and_a_pool_of_their_own_heads(ranks):
    two = ranks.several("mha", xquant=X, tensor_parallel_size=2, distributed_executor_backend="mp")
    one = ranks.one("mha", xquant=X)
    said = (
        "with --tensor-parallel-size 2 every rank keeps the whole layer input, 128 channels instead of the 128 of its "
        "own keys and values: the saving over 16 bit is 2 times smaller than on one rank"
    )
    assert two.log.count(said) == 1
    pool = pool_tokens(one.log)[0]
    assert pool_tokens(two.log) in ([2 * pool], [2 * pool + 1])


ODD = {"worker_cls": "odd_worker.OddWorker", "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.nightly
def test_a_rank_that_cannot_write_its_cache_computes_its_factors(ranks, tmp_path):
    """The other one keeps them."""
    environment = {
        "PYTHONPATH": search_path(HERE),
        "XDG_CACHE_HOME": str(tmp_path),
        "ODD_RANK": '{"XDG_CACHE_HOME": "/proc"}',
    }
    latents = {"bits": 8, "cache": "latent"}
    odd = ranks.several("mqa", environment=environment, xquant=latents, **ODD)
    assert odd.log.count("xquant: factors cannot be kept in /proc/xquant_vllm") == 1
    assert len(list((tmp_path / "xquant_vllm").iterdir())) == 3
    assert distance(odd, ranks.one("mqa", xquant=latents)) <= 2e-3


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("odd", "named"),
    [
        (
            {"ODD_RANK": '{"XQUANT_ATTENTION_KERNELS": "reference"}'},
            r"xquant: rank 1 on \S+ runs with XQUANT_ATTENTION_KERNELS=reference, the engine with no XQUANT",
        ),
        # As if it had been started by hand, on another machine.
        (
            {"ODD_SETTINGS": '{"bits": 4}'},
            r"xquant: rank 1 on \S+ runs with xquant=\{'bits': 4\}, rank 0 on \S+ with xquant=\{'bits': 8, .*\}; give ",
        ),
    ],
)
def test_a_rank_that_is_set_up_otherwise_is_named(ranks, odd, named):
    with pytest.raises(EngineFailed, match=named):
        ranks.several("mqa", environment={"PYTHONPATH": search_path(HERE), **odd}, xquant={"bits": 8}, **ODD)


@pytest.mark.nightly
def test_kivi_cuts_its_heads(ranks):
    settings = {"kivi": {"bits": 4}, "block_size": 128}
    two = ranks.several("mha", "kivi", tensor_parallel_size=2, **settings)
    one = ranks.one("mha", "kivi", **settings)
    assert distance(two, one) <= 2e-3
    assert tokens(two) == tokens(one)
    assert two.cache_tokens == pytest.approx(2 * one.cache_tokens, rel=0.02)
