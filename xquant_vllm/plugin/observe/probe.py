"""The quality probe: now and then a layer's pages are compared with what they were made from, while serving.

On CPUs only. A captured CUDA graph holds no Python, and what is compared would have to be read back from the device.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.attention.probe import deviation
from xquant_vllm.plugin.engine_settings import settings_of
from xquant_vllm.plugin.load.report import load_notes
from xquant_vllm.plugin.observe import metrics
from xquant_vllm.plugin.observe.board import Board, board_of


class QualityProbe:
    """Chooses calls of an engine's layers and compares.

    Attributes:
        every: a call of so many is chosen; no divisor of the number of layers, so that all have their turn.
    """

    def __init__(self, share: float, layers: int, board: Board) -> None:
        """Nothing is chosen yet.

        Args:
            share: of the calls, above 0.
            layers: of the rank.
            board: where to write.
        """
        self.every = max(1, round(1 / share))
        while math.gcd(self.every, layers) > 1:
            self.every += 1
        self._board, self._calls = board, 0

    def is_due(self) -> bool:
        """Count a call of a layer; whether it is chosen."""
        self._calls += 1
        if self._calls < self.every:
            return False
        self._calls = 0
        return True

    def measure(
        self,
        impl: Any,
        query: torch.Tensor,
        pages: Sequence[torch.Tensor],
        plan: AttentionLayerPlan,
        batch: AttentionBatch,
        inputs: Sequence[torch.Tensor],
    ) -> None:
        """Compare, and add to the metrics; arguments as of :func:`deviation`, ``impl`` the layer's implementation."""
        found = deviation(query, pages, plan, batch, inputs, impl.scheme.folded_value)
        if found is None:
            return
        layer = impl.scheme.format.shape.index
        self._board.add(metrics.KEY_ERROR, found.keys, layer)
        self._board.add(metrics.VALUE_ERROR, found.values, layer)
        if found.attention is not None:
            self._board.add(metrics.DIVERGENCE, found.attention, layer)


def why_off(vllm_config: Any) -> str | None:
    """Why there is no probe, or None."""
    if not settings_of(vllm_config).quality_probe:
        return "off"
    if vllm_config.device_config.device_type != "cpu":
        return "off, although it is set: it runs on CPUs only, as captured graphs leave it out"
    if board_of(vllm_config) is None:
        return "off, although it is set: without metrics nobody could read it"
    return None


@per_object
def probe_of(vllm_config: Any) -> QualityProbe | None:
    """Of an engine; None without."""
    board = board_of(vllm_config)
    if board is None or why_off(vllm_config) is not None:
        return None
    layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    return QualityProbe(settings_of(vllm_config).quality_probe, layers, board)


def describe_probe(vllm_config: Any) -> str:
    """For the summary."""
    probe = probe_of(vllm_config)
    if probe is None:
        return why_off(vllm_config) or "off"
    layers = len(load_notes(vllm_config.compilation_config).caches[0].formats)
    return f"compares one of {probe.every:,} calls of {layers} layers"
