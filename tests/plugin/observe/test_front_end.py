"""Room for the metrics in the process that makes a configuration."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from xquant_vllm.plugin.observe import front_end, metrics
from xquant_vllm.plugin.observe.board import Board
from xquant_vllm.plugin.refusals import unwrap_from_validation


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(front_end.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(front_end.atexit, "register", lambda *args: None)
    monkeypatch.delenv(front_end.VARIABLE, raising=False)
    before = set(REGISTRY._collector_to_names)
    yield SimpleNamespace(instance_id="123")
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def test_the_registry_that_vllm_serves_shows_what_workers_write(config):
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    front_end.open_folder(config)
    folder = front_end.folder_of(config)
    assert folder.stat().st_mode & 0o777 == 0o700
    Board(folder, ("m", "0", "0")).set(metrics.HOT, 3)
    labels = {"model_name": "m", "engine": "0", "rank": "0"}
    assert get_prometheus_registry().get_sample_value("xquant_hot_tokens", labels) == 3


def test_between_several_api_servers_vllms_folder_is_taken(config, monkeypatch, tmp_path):
    monkeypatch.setenv(front_end.VARIABLE, str(tmp_path))
    before = set(REGISTRY._collector_to_names)
    front_end.open_folder(config)
    assert front_end.folder_of(config) == tmp_path
    assert set(REGISTRY._collector_to_names) == before
    assert not list(tmp_path.iterdir())


def test_no_folder_costs_the_metrics_alone(config, monkeypatch, caplog):
    monkeypatch.setattr(front_end.tempfile, "gettempdir", lambda: "/proc/none")
    front_end.open_folder(config)
    assert "metrics are off: /proc/none/xquant-metrics-123 cannot be made (No such file or directory)" in caplog.text


CODE = """
import multiprocessing, os, sys
from types import SimpleNamespace
from xquant_vllm.plugin.observe import front_end
from xquant_vllm.plugin.refusals import unwrap_from_validation
config = SimpleNamespace(instance_id=sys.argv[1])
front_end.open_folder(config)
multiprocessing.get_context("fork").Process(target=print).start()
if not os.fork():
    sys.exit()
os.wait()
assert front_end.folder_of(config).is_dir()
"""


def test_the_folder_goes_with_the_process_that_made_it(tmp_path):
    name = f"{time.time_ns()}"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop(front_end.VARIABLE, None)
    done = subprocess.run([sys.executable, "-c", CODE, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("backend", "no_statistics", "made"), [("XQUANT", False, 1), ("XQUANT", True, 0), ("CPU_ATTN", False, 0)]
)
def test_only_for_engines_of_this_backend_with_statistics(config, monkeypatch, backend, no_statistics, made):
    import vllm.engine.arg_utils as module

    chosen = SimpleNamespace(backend=SimpleNamespace(name=backend))
    answer = SimpleNamespace(attention_config=chosen, instance_id="9")
    arguments = SimpleNamespace(disable_log_stats=no_statistics, attention_backend=None, attention_config=None)
    monkeypatch.setattr(module.EngineArgs, "create_engine_config", lambda self, usage_context=None: answer)
    opened = []
    monkeypatch.setattr(front_end, "open_folder", opened.append)
    unwrap_from_validation(lambda *_: None, front_end.share_metrics)
    unwrap_from_validation(lambda *_: None, front_end.share_metrics)
    assert module.EngineArgs.create_engine_config(arguments) is answer
    assert opened == [answer] * made
