"""Counts what every step attends to, from what vLLM's scheduler says of it: no device is asked."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from xquant_vllm.attention.hot.policy import HotCounts
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.plugin.builders import builders_of
from xquant_vllm.plugin.observe import metrics
from xquant_vllm.plugin.observe.board import Board, board_of
from xquant_vllm.plugin.worker_class import worker_class


@functools.cache
def count_steps() -> None:
    """Let vLLM's worker count its steps where metrics can be scraped, once per process."""
    worker = worker_class()
    original = worker.execute_model

    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        board = board_of(self.vllm_config)
        if board is None:
            return original(self, scheduler_output)
        result = original(self, scheduler_output)
        counter_of(self.vllm_config).count(board, self.vllm_config, scheduler_output)
        return result

    worker.execute_model = execute_model


class StepCounter:
    """The sums of an engine's steps. Layers may see different tokens: numbers are means over them."""

    def __init__(self) -> None:
        """No step yet."""
        self._known: dict[tuple[str, ...], HotCounts] = {}
        self._promoted = self._rematerialized = 0.0

    def count(self, board: Board, vllm_config: Any, output: Any) -> None:
        """Count a step that has been taken.

        Args:
            board: where to write.
            vllm_config: vLLM's configuration, with the metadata builders.
            output: vLLM's ``SchedulerOutput`` of the step.
        """
        layers = hot = cold = promoted = written = 0
        computed = _computed(output)
        for names, builder in builders_of(vllm_config.compilation_config).items():
            windows, hot_map = getattr(builder, "attended", ({}, None))
            number = sum(windows.values())
            layers += number
            if hot_map is None:
                cold += _attended(windows, computed, output.total_num_scheduled_tokens)
                continue
            of_step = hot_map.counts.plus(self._known.get(tuple(names), HotCounts()), -1)
            self._known[tuple(names)] = hot_map.counts
            hot += number * of_step.hot_tokens
            cold += number * of_step.cold_tokens
            promoted += number * of_step.promoted_tokens
            written += number * (of_step.promoted_tokens + of_step.new_tokens)
        if not layers:
            return
        self._promoted += promoted / layers
        self._rematerialized += (written + cold) / layers
        board.set(metrics.HOT, hot / layers)
        board.set(metrics.COLD, cold / layers)
        board.set(metrics.PROMOTED, self._promoted)
        board.set(metrics.REMATERIALIZED, self._rematerialized)


@per_object
def counter_of(vllm_config: Any) -> StepCounter:
    """Of an engine."""
    return StepCounter()


def _computed(output: Any) -> list[int]:
    """Of every request of a step the tokens that it had before."""
    new = [request.num_computed_tokens for request in output.scheduled_new_reqs]
    return [*new, *output.scheduled_cached_reqs.num_computed_tokens]


def _attended(windows: Mapping[int | None, int], computed: Sequence[int], scheduled: int) -> int:
    """Tokens that layers attend to in a step, times how many layers there are."""
    tokens = 0
    for window, number in windows.items():
        # As attended_before in policy.py; for so few numbers Python takes less time than NumPy.
        before = computed if window is None else [min(count, window - 1) for count in computed]
        tokens += number * (scheduled + sum(before))
    return tokens
