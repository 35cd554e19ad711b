"""Decides before each step on a GPU which blocks are hot, and promotes: from what vLLM's scheduler says of the step.

Block tables and lengths of a batch are on the device, and reading them back would make the host wait for the step
before. The scheduler's output names the blocks of every request, to both of vLLM's model runners. So the worker's
``execute_model`` is wrapped. Promotion runs there, too, layer by layer before the model does: a captured CUDA graph
holds no promotion, and at that time the buffers are free.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from xquant_vllm.attention.hot.policy import HotStep
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.plugin.hot.gpu import HotGroup, hot_engine, on_device
from xquant_vllm.plugin.hot.worker import forget_written


@functools.cache
def follow_scheduler() -> None:
    """Let vLLM's worker decide on hot blocks before each step, once per process."""
    from vllm.v1.worker.gpu_worker import Worker  # that of CPUs derives from it

    original = Worker.execute_model

    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        groups = hot_engine(self.vllm_config).groups
        if not groups:
            return original(self, scheduler_output)
        with torch.inference_mode():
            _steps(self.vllm_config).decide(self.vllm_config, self.model_runner.kv_cache_config, scheduler_output)
        try:
            return original(self, scheduler_output)
        finally:
            # What else is built, for drafts or for dummy batches, is not of this step.
            for group in groups.values():
                group.decide(None)

    Worker.execute_model = execute_model


class RequestBlocks:
    """The blocks of all requests that have any, as the scheduler's outputs name them."""

    def __init__(self) -> None:
        """There are none."""
        self._blocks: dict[str, list[list[int]]] = {}

    def follow(self, output: Any) -> dict[str, int]:
        """Take over an output.

        Args:
            output: vLLM's ``SchedulerOutput``.

        Returns:
            Of every request of the step how many of its tokens were computed before; drafted tokens that vLLM has not
            decided on yet count as kept.
        """
        for request in output.finished_req_ids:
            self._blocks.pop(request, None)
        computed: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self._blocks[new.req_id] = [list(blocks) for blocks in new.block_ids]
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for request, blocks, tokens in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request in cached.resumed_req_ids:
                self._blocks[request] = [list(of_group) for of_group in blocks]
            elif blocks is not None:
                for known, more in zip(self._blocks[request], blocks, strict=True):
                    known.extend(more)
            computed[request] = tokens
        return computed

    def table(self, requests: Sequence[str], group: int) -> np.ndarray:
        """Block table of some requests, ``[requests, columns]`` int32, 0 past a request's last block."""
        rows = [self._blocks[request][group] for request in requests]
        table = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
        for row, blocks in enumerate(rows):
            table[row, : len(blocks)] = blocks
        return table


class HotSteps:
    """The decisions of an engine."""

    def __init__(self) -> None:
        """No step yet."""
        self.requests = RequestBlocks()

    def decide(self, vllm_config: Any, kv_cache_config: Any, output: Any) -> None:
        """Change the maps for a step and promote.

        Args:
            vllm_config: vLLM's configuration, with the layers.
            kv_cache_config: vLLM's ``KVCacheConfig``.
            output: vLLM's ``SchedulerOutput`` of the step.
        """
        computed = self.requests.follow(output)
        names = list(output.num_scheduled_tokens)
        counts = np.array([output.num_scheduled_tokens[name] for name in names], np.int64)
        lengths = np.array([computed[name] for name in names], np.int64) + counts
        layers = vllm_config.compilation_config.static_forward_context
        for index, of_cache in enumerate(kv_cache_config.kv_cache_groups):
            for group in hot_engine(vllm_config).groups.values():
                if not set(group.layer_names) <= set(of_cache.layer_names):
                    continue
                forget_written(group.hot_map, output)
                if output.kv_cache_block_copies:
                    # They are written after this, so nothing is promoted from them.
                    group.show()
                    group.decide("none")
                elif names:
                    _plan(group, self.requests.table(names, index), lengths, counts, layers)


@per_object
def _steps(vllm_config: Any) -> HotSteps:
    return HotSteps()


def _plan(group: HotGroup, table: np.ndarray, lengths: np.ndarray, counts: np.ndarray, layers: Any) -> None:
    """One group's part of a step."""
    exact: Any = None if group.exact_from is None else counts >= group.exact_from
    step = group.hot_map.plan(table, lengths, counts, exact)
    group.show()
    hot = int(step.hot.sum())
    rows = list(zip(counts.tolist(), lengths.tolist(), step.hot.tolist(), strict=True))
    hot_lengths = {(count, length) for count, length, is_hot in rows if is_hot}
    hot_lengths -= {(count, length) for count, length, is_hot in rows if not is_hot}
    group.decide("all" if hot == len(counts) else "some" if hot else "none", hot_lengths)
    group.log.say(group.hot_map)
    if step.promoted:
        _promote(group, step, layers)


def _promote(group: HotGroup, step: HotStep, layers: Any) -> None:
    """Write promoted tokens to the pools of all layers, in their order, so that chains go on from layer to layer."""
    device = group.hot_of.device
    slots, positions, hot_slots = (
        on_device(np.ascontiguousarray(of[: step.promoted], np.int64), device)
        for of in (step.slots, step.positions, step.hot_slots)
    )
    tokens = HotTokens(slots, positions, hot_slots)
    for name in group.layer_names:
        layers[name].impl.write_hot(layers[name].kv_cache, tokens)
