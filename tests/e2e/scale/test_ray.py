"""Ranks that Ray starts.

vLLM offers Ray no CPUs: with any backend ``--distributed-executor-backend ray`` ends there with an error, which this
package says first (``tests/plugin/test_ranks.py``). Here a platform plugin gives Ray two devices; all else is as on a
cluster: an actor per rank, configurations that travel by pickle, variables of the driver.
"""

import pytest

from tests.e2e.engine import EngineFailed
from tests.e2e.scale.conftest import HERE, distance, search_path, tokens

pytestmark = pytest.mark.e2e

RAY = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
# With a pool of hot blocks, by default.
X = {"bits": 8, "cache": "x"}


@pytest.fixture
def environment(tmp_path):
    from tests.e2e.scale.ray_platform import install

    # Ray would leave out of its log what two actors say alike.
    return {"PYTHONPATH": search_path(install(tmp_path), HERE), "RAY_DEDUP_LOGS": "0"}


@pytest.mark.nightly
def test_two_actors_answer_like_one_rank(ranks, environment):
    two = ranks.several("mha", environment=environment, xquant=X, **RAY)
    one = ranks.one("mha", xquant=X)
    assert distance(two, one) <= 2e-3
    assert distance(two, ranks.one("mha", "CPU_ATTN")) <= 0.06
    assert tokens(two) == tokens(one)
    assert two.cache_tokens == one.cache_tokens  # every rank keeps all of X
    assert two.log.count("bytes per token on this rank") == 1
    assert two.log.count("keep the keys and values of up to") == 1


@pytest.mark.nightly
def test_vllm_itself_gives_ray_no_cpus(ranks):
    """So that the refusal is not this package's alone; it can go when this fails."""
    with pytest.raises(EngineFailed, match="current platform cpu does not support ray"):
        ranks.several("qwen3", "CPU_ATTN", **RAY)
