"""The prefix cache of an engine whose workers have new weights."""

import sys
from types import SimpleNamespace

import pytest

from xquant_vllm.plugin.reload import engine_core


class Core:
    """As much of vLLM's engine core as is called."""

    def __init__(self, backend="XQUANT"):
        chosen = SimpleNamespace(backend=SimpleNamespace(name=backend), backend_per_kind=None)
        self.vllm_config = SimpleNamespace(attention_config=chosen)
        self.model_executor = SimpleNamespace(collective_rpc=lambda method, *_: [method(None)])
        self.resets = []

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        return self.model_executor.collective_rpc(method, timeout, args, kwargs)

    def reset_prefix_cache(self, reset_running_requests):
        self.resets.append(reset_running_requests)


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    monkeypatch.setattr(Core, "collective_rpc", Core.collective_rpc)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", SimpleNamespace(EngineCore=Core))
    engine_core.watch_engine_core()
    engine_core.watch_engine_core()


def fails(worker):
    engine_core.count_change()
    raise ConnectionError


def test_it_is_dropped_after_new_weights_alone():
    core = Core()
    assert core.collective_rpc(lambda worker: 5) == [5]
    assert core.resets == []
    core.collective_rpc(lambda worker: engine_core.count_change())
    assert core.resets == [True]
    with pytest.raises(ConnectionError):
        core.collective_rpc(fails)
    assert core.resets == [True, True]


def test_other_backends_are_not_asked():
    core = Core("CPU_ATTN")
    core.collective_rpc(lambda worker: engine_core.count_change())
    assert core.resets == []


def test_nothing_is_loaded_for_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm.v1.engine.core")
    engine_core.watch_engine_core()
    assert "vllm.v1.engine.core" not in sys.modules
