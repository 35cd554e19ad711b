"""The line of the log that says what was hot."""

import logging
import time

from xquant_vllm.attention.hot.policy import HotMap

logger = logging.getLogger("vllm.xquant_vllm")

# Seconds between two lines.
_EVERY = 60


class HotLog:
    """Of one map."""

    def __init__(self) -> None:
        """The first line comes after the first minute."""
        self._logged = time.monotonic()

    def say(self, hot_map: HotMap) -> None:
        """Say what was hot since the last line, if that is long enough ago."""
        now = time.monotonic()
        if now - self._logged < _EVERY:
            return
        self._logged = now
        counts = hot_map.take_counts()
        logger.info(
            "xquant: hot blocks: since the last such line %d rows were attended from the pool and %d from pages; %d "
            "new and %d promoted tokens were written to the pool",
            counts.hot_rows,
            counts.cold_rows,
            counts.new_tokens,
            counts.promoted_tokens,
        )
