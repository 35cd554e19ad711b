"""Fixtures of the tests of loading."""

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """vLLM's layers ask which rank they are, and for the configuration."""
    with set_current_vllm_config(VllmConfig()):
        store = f"file://{tmp_path_factory.mktemp('ranks') / 'store'}"
        init_distributed_environment(1, 0, store, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
        cleanup_dist_env_and_memory()
