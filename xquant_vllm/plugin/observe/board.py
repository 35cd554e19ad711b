"""Where a worker writes its numbers for the server that is scraped: memory that both have mapped.

Workers are other processes than the API server. prometheus_client has a way for that, files of numbers in a folder, and
a collector that reads them when somebody scrapes. vLLM uses it between several API servers; then the folder is vLLM's,
and its own collector finds the numbers. With one API server it has no folder, and front_end.py makes one. A worker
writes to mapped memory, whoever looks: no call, no message, no lock.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xquant_vllm.attention.per_object import per_object
from xquant_vllm.plugin.observe.front_end import folder_of
from xquant_vllm.plugin.observe.metrics import LABELS, Metric


class Board:
    """The numbers of one rank. Only its own thread writes."""

    def __init__(self, folder: Path, labels: tuple[str, ...]) -> None:
        """Nothing is written yet.

        Args:
            folder: that the collector reads.
            labels: values of :data:`LABELS`.
        """
        self._folder, self._labels = folder, dict(zip(LABELS, labels, strict=True))
        self._files: dict[str, Any] = {}
        self._keys: dict[tuple[str, int | None], tuple[Any, str]] = {}
        self._sums: dict[tuple[str, int], float] = {}

    def set(self, metric: Metric, value: float) -> None:
        """Write a gauge, or a counter's sum since the start."""
        self._write(metric, metric.samples[0], value, None)

    def begin(self, metric: Metric, layers: Iterable[int]) -> None:
        """Write empty summaries, so that the first number that is added is seen as an increase."""
        for layer in layers:
            for sample in metric.samples:
                self._sums[sample, layer] = 0.0
                self._write(metric, sample, 0.0, layer)

    def add(self, metric: Metric, value: float, layer: int) -> None:
        """Add a number to a layer's summary, which has begun."""
        for sample, more in zip(metric.samples, (value, 1.0), strict=True):
            self._sums[sample, layer] += more
            self._write(metric, sample, self._sums[sample, layer], layer)

    def _write(self, metric: Metric, sample: str, value: float, layer: int | None) -> None:
        place = self._keys.get((sample, layer))
        if place is None:
            place = self._keys[sample, layer] = self._place(metric, sample, layer)
        file, key = place
        file.write_value(key, float(value), 0.0)

    def _place(self, metric: Metric, sample: str, layer: int | None) -> tuple[Any, str]:
        from prometheus_client.mmap_dict import MmapedDict, mmap_key

        # One rank writes a sample, so the sum over processes is that rank's.
        kind = "gauge_sum" if metric.kind == "gauge" else metric.kind
        if kind not in self._files:
            # prometheus_client takes the third part of a name for the process, and other files may have this one's.
            self._files[kind] = MmapedDict(str(self._folder / f"{kind}_xquant-{os.getpid()}.db"))
        labels = self._labels if layer is None else {**self._labels, "layer": str(layer)}
        return self._files[kind], mmap_key(metric.name, sample, list(labels), list(labels.values()), metric.text)


@per_object
def board_of(vllm_config: Any) -> Board | None:
    """The board of this rank; None where nobody can scrape: the engine was made without statistics, or elsewhere."""
    folder = folder_of(vllm_config)
    if not folder.is_dir():
        return None
    parallel = vllm_config.parallel_config
    labels = (vllm_config.model_config.served_model_name, parallel.data_parallel_index, parallel.rank)
    return Board(folder, tuple(map(str, labels)))
