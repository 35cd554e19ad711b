"""What is counted of steps, by windows and by what is hot."""

from types import SimpleNamespace

import numpy as np
import pytest

from xquant_vllm.attention.hot.policy import HotMap
from xquant_vllm.plugin.builders import builders_of
from xquant_vllm.plugin.observe import metrics
from xquant_vllm.plugin.observe import steps as steps_module
from xquant_vllm.plugin.observe.steps import StepCounter


class Compilation:
    """vLLM's; can be weakly referenced."""


class Builder:
    """A metadata builder."""

    def __init__(self, windows, hot_map=None) -> None:
        self.attended = (windows, hot_map)


class Seen:
    """In place of a board: what was written last."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}

    def set(self, metric, value) -> None:
        self.numbers[metric.name.removeprefix("xquant_").removesuffix("_tokens")] = value


def output(*requests, new=1):
    """A step; requests are pairs of computed and scheduled tokens, the first of them new."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(num_computed_tokens=computed) for computed, _ in requests[:new]],
        scheduled_cached_reqs=SimpleNamespace(num_computed_tokens=[computed for computed, _ in requests[new:]]),
        total_num_scheduled_tokens=sum(scheduled for _, scheduled in requests),
    )


@pytest.fixture
def count():
    """Counts steps of an engine with some builders; what is written then."""
    counter, board = StepCounter(), Seen()
    config = SimpleNamespace(compilation_config=Compilation())

    def count(builders, step):
        for index, builder in enumerate(builders):
            builders_of(config.compilation_config)[(str(index),)] = builder
        counter.count(board, config, step)
        return board.numbers

    return count


def test_without_a_pool_all_is_read_in_every_step(count):
    builders = [Builder({None: 3}), Builder({})]
    assert count(builders, output((0, 40), (100, 1))) == {"hot": 0, "cold": 141, "promoted": 0, "rematerialized": 141}
    assert count(builders, output((40, 1), (101, 1), new=0))["rematerialized"] == 141 + 143
    idle = count(builders, output(new=0))
    assert (idle["cold"], idle["rematerialized"]) == (0, 284)


def test_a_window_keeps_its_tokens_and_numbers_are_means_over_layers(count):
    """Two layers see 16 tokens, one sees all."""
    numbers = count([Builder({16: 2, None: 1})], output((0, 40), (100, 1)))
    assert numbers["cold"] == pytest.approx((2 * (40 + 15 + 1) + 141) / 3)


def test_a_pool_says_what_is_hot(count):
    hot_map = HotMap(8, 16)
    builders = [Builder({None: 2}, hot_map)]
    table = np.array([[1, 2, 3], [4, 5, 6]])
    hot_map.plan(table, np.array([40, 20]), np.array([40, 20]), np.array([False, True]))
    # The second is hot, too, but has to be attended from its pages.
    expected = {"hot": 40, "cold": 20, "promoted": 0, "rematerialized": 60 + 20}
    assert count(builders, output((0, 40), (0, 20), new=2)) == expected
    hot_map.forget(np.array([1]))
    hot_map.plan(table, np.array([41, 21]), np.array([1, 1]))
    expected = {"hot": 62, "cold": 0, "promoted": 16, "rematerialized": 80 + 16 + 2}
    assert count(builders, output((40, 1), (20, 1), new=0)) == expected
    # A step without tokens plans nothing.
    assert count(builders, output(new=0))["hot"] == 0


def test_layers_of_a_draft_are_left_out(count):
    assert count([Builder({})], output((0, 5))) == {}


def test_a_worker_counts_where_metrics_can_be_scraped(monkeypatch):
    from vllm.v1.worker.cpu_worker import CPUWorker

    monkeypatch.setattr(CPUWorker, "execute_model", lambda self, output: output)
    boards = [None, Seen()]
    monkeypatch.setattr(steps_module, "board_of", lambda config: boards[0])

    class Config:
        compilation_config = Compilation()

    config = Config()
    builder = Builder({None: 1})
    builders_of(config.compilation_config)[("a",)] = builder
    steps_module.count_steps.cache_clear()
    steps_module.count_steps()
    steps_module.count_steps()
    worker, step = SimpleNamespace(vllm_config=config), output((0, 5))
    assert CPUWorker.execute_model(worker, step) is step
    boards.pop(0)
    assert CPUWorker.execute_model(worker, step) is step
    assert boards[0].numbers["rematerialized"] == 5
    assert metrics.REMATERIALIZED.samples == ("xquant_rematerialized_tokens_total",)
    steps_module.count_steps.cache_clear()
