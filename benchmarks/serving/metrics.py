"""What a vLLM server counts, read from its /metrics while a load runs."""

import contextlib
import re
import threading
import urllib.error
import urllib.request
from types import TracebackType

_SECONDS = 0.1
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
}
_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"


def parse(text: str) -> dict[str, float]:
    """Sums over labels of every sample in Prometheus' text format."""
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^([\w:]+)(?:\{[^}]*\})? ([^ ]+)$", text, re.MULTILINE):
        with contextlib.suppress(ValueError):
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


class Watch:
    """Watches a server while it is entered: the most requests that ran and waited, and how far counters went."""

    def __init__(self, url: str) -> None:
        """Prepare to watch the server at ``url``."""
        self._url = f"{url}/metrics"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_running = 0
        self.peak_waiting = 0
        self.counts: dict[str, float] = {}

    def __enter__(self) -> "Watch":
        """Begin."""
        self._before = self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._stop.set()
        self._thread.join()
        if error is None:
            after = self._read()
            for name, counter in COUNTERS.items():
                self.counts[name] = after.get(counter, 0.0) - self._before.get(counter, 0.0)

    def _read(self) -> dict[str, float]:
        with urllib.request.urlopen(self._url, timeout=60) as answer:
            return parse(answer.read().decode())

    def _run(self) -> None:
        while not self._stop.wait(_SECONDS):
            # A server under load may be late; what counts is the peak.
            with contextlib.suppress(urllib.error.URLError, OSError):
                now = self._read()
                self.peak_running = max(self.peak_running, int(now.get(_RUNNING, 0)))
                self.peak_waiting = max(self.peak_waiting, int(now.get(_WAITING, 0)))
