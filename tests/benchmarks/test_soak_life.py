"""A cache's turn on a server that stands in for vLLM's."""

import sys
from pathlib import Path

import pytest

from benchmarks.soak import life, result
from benchmarks.soak.caches import SoakedCache
from benchmarks.soak.load import Load
from examples.vllm_process import VllmServer

STAND_IN = Path(__file__).with_name("stand_in_server.py")
WORDS = [f"word{i}" for i in range(5000)]


@pytest.fixture
def soak(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Runs a cache's turn of 40 requests, with more options for the server."""

    def soak(cache: SoakedCache, *options: str) -> dict:
        def server(arguments: list[str], *others) -> VllmServer:
            return VllmServer([*options, *arguments], *others, program=[sys.executable, str(STAND_IN)])

        monkeypatch.setattr(life, "VllmServer", server)
        return result.of_turn(life.Soak(cache, tmp_path, tmp_path, Load(WORDS, 0)).run(40))

    return soak


def test_all_is_well(soak) -> None:
    numbers = soak(SoakedCache("name"))
    assert numbers["failures"] == []
    assert numbers["requests"] == 1 + 16 + 40 + 1
    assert numbers["aborted"] > 0
    assert (numbers["leaked_blocks"], numbers["drift"], numbers["preemptions"]) == (0, 0, 1)
    assert set(numbers["rss_growth_mb_by_process"]) == {"API server", "VLLM::EngineCore"}
    assert len(numbers["rss_growth_mb_by_quarter"]) == 4


def test_its_engine_core_is_killed_and_it_goes_on(soak) -> None:
    numbers = soak(SoakedCache("name", is_killed=True))
    assert numbers["failures"] == []
    assert numbers["requests"] == 58 + 1 + 16 + 1
    assert "answers /health with 503" in numbers["after_kill"]


def test_a_factor_cache_that_a_kill_has_damaged_is_seen(soak) -> None:
    numbers = soak(SoakedCache("name", is_killed=True), "--forgets")
    assert numbers["failures"] == ["killed: the factor cache after the kill: layer.safetensors is damaged"]


def test_leaks_and_drift_are_seen(soak) -> None:
    numbers = soak(SoakedCache("name"), "--leaks", "3", "--drifts")
    assert numbers["leaked_blocks"] == 3
    assert numbers["drift"] > 1
