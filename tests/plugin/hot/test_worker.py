"""What vLLM's worker does for hot blocks."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from tests.plugin.hot.test_budget import BLOCK, PER_TOKEN, TOTAL, Config, Layer
from xquant_vllm.attention.hot.policy import HotMap
from xquant_vllm.plugin.connectors.transfers import Page, PageTransfers
from xquant_vllm.plugin.hot import budget as hot_budget
from xquant_vllm.plugin.hot import worker as hot_worker
from xquant_vllm.scheme.hot_share import DEFAULT_SHARE


@pytest.fixture
def worker(monkeypatch):
    """vLLM's class of CPU workers, with nothing behind it."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    monkeypatch.setattr(CPUWorker, "determine_available_memory", lambda self: TOTAL)
    monkeypatch.setattr(CPUWorker, "execute_model", lambda self, output: output)
    monkeypatch.setattr(CPUWorker, "shutdown", lambda self: "ended")
    monkeypatch.setattr(hot_budget, "Attention", Layer)
    monkeypatch.setattr(hot_worker, "_page_needs", lambda of: of.vllm_config.needs)
    hot_worker.keep_pool_back.cache_clear()
    yield CPUWorker
    hot_worker.keep_pool_back.cache_clear()


def test_a_worker_gives_the_pool_up_and_says_at_its_end_what_it_was_good_for(worker, caplog):
    hot_worker.keep_pool_back()
    hot_worker.keep_pool_back()
    config = Config({"cache": "x"})
    one = SimpleNamespace(vllm_config=config)
    taken = int(TOTAL * DEFAULT_SHARE) // PER_TOKEN * PER_TOKEN
    assert worker.determine_available_memory(one) == TOTAL - taken
    hot_map = HotMap(8, BLOCK, 48)
    hot_map.plan(np.array([[1]]), np.array([20]), np.array([20]))
    hot_budget.hot_memory(config).maps[0] = (hot_map, None, None)
    with caplog.at_level(logging.INFO, "vllm.xquant_vllm"):
        assert worker.shutdown(one) == "ended"
    assert (
        "in all 1 rows of batches were attended from the pool and 0 from pages; 20 new and 0 promoted tokens were "
        "written to the pool (layers with windows of 48 tokens)" in caplog.text
    )


def test_pages_that_vllm_copies_are_not_hot(worker):
    """The block may still have the hot block of its former owner."""
    hot_worker.keep_pool_back()
    config = Config({"cache": "x"})
    one = SimpleNamespace(vllm_config=config)
    hot_map = HotMap(8, BLOCK)
    hot_map.plan(np.array([[1, 2]]), np.array([40]), np.array([40]))
    hot_budget.hot_memory(config).maps[0] = (hot_map, None, None)
    for copies, hot in (([], 2), (None, 2), ([(1, 3)], 0)):
        output = SimpleNamespace(kv_cache_block_copies=copies, kv_connector_metadata=None)
        assert worker.execute_model(one, output) is output
        assert np.count_nonzero(hot_map.hot_of(np.arange(8))) == hot


class OfAnotherConnector:
    """Metadata that says nothing of what is loaded."""


def test_pages_that_a_connector_reads_are_not_hot(worker):
    """Each group's map forgets them: all groups take blocks from one pool."""
    hot_worker.keep_pool_back()
    loads = PageTransfers({"request": [Page(0, b"key", 2), Page(1, b"key", 3)]})
    offloaded = SimpleNamespace(load_jobs={7: SimpleNamespace(dst_spec=SimpleNamespace(block_ids=np.array([1, 5])))})
    for metadata, hot in ((PageTransfers(), [1, 2, 3]), (loads, [1]), (offloaded, [2, 3]), (OfAnotherConnector(), [])):
        config = Config({"cache": "x"})
        hot_map = HotMap(8, BLOCK)
        hot_map.plan(np.array([[1, 2, 3]]), np.array([80]), np.array([80]))
        hot_budget.hot_memory(config).maps[0] = (hot_map, None, None)
        output = SimpleNamespace(kv_cache_block_copies=None, kv_connector_metadata=metadata)
        assert worker.execute_model(SimpleNamespace(vllm_config=config), output) is output
        assert np.flatnonzero(hot_map.hot_of(np.arange(8))).tolist() == hot


def test_on_a_gpu_its_own_worker_gives_the_pool_up(worker, monkeypatch):
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    for name in ("determine_available_memory", "shutdown", "execute_model"):
        monkeypatch.setattr(Worker, name, getattr(Worker, name))
    before = worker.determine_available_memory, Worker.determine_available_memory
    hot_worker.keep_pool_back()
    assert worker.determine_available_memory is before[0]
    assert Worker.determine_available_memory is not before[1]


def test_blocks_of_the_longest_sequence():
    """Whole blocks; layers whose pages differ count their own."""
    plain = SimpleNamespace(max_memory_usage_bytes=lambda config: 41, page_size_bytes=10)
    assert hot_worker._most_blocks(plain, None) == 5
    assert hot_worker._most_blocks(SimpleNamespace(max_memory_usage_pages=lambda config: 7), None) == 7
