"""The lines of the log that say what was hot."""

import logging
import time

from xquant_vllm.attention.hot.policy import HotCounts, HotMap

logger = logging.getLogger("vllm.xquant_vllm")

# Seconds between two lines.
_EVERY = 60


class HotLog:
    """Of one map."""

    def __init__(self) -> None:
        """The first line comes after the first minute."""
        self._logged, self._said = time.monotonic(), HotCounts()

    def say(self, hot_map: HotMap) -> None:
        """Say what was hot since the last line, if that is long enough ago."""
        now = time.monotonic()
        if now - self._logged < _EVERY:
            return
        say_counts(hot_map, hot_map.counts.plus(self._said, -1), f"in the last {now - self._logged:.0f} s")
        self._logged, self._said = now, hot_map.counts


def say_counts(hot_map: HotMap, counts: HotCounts, when: str) -> None:
    """What the log says of steps.

    Args:
        hot_map: of a KV cache group.
        counts: sums over its steps.
        when: which steps.
    """
    logger.info(
        "xquant: hot blocks: %s %s rows of batches were attended from the pool and %s from pages; %s new and %s "
        "promoted tokens were written to the pool%s",
        when,
        *(f"{number:,}" for number in (counts.hot_rows, counts.cold_rows, counts.new_tokens, counts.promoted_tokens)),
        "" if hot_map.window is None else f" (layers with windows of {hot_map.window:,} tokens)",
    )
