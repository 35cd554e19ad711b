"""Results of many layers, computed side by side and a few layers ahead of where they are needed."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")

_MOST_WORKERS = 8


class AheadPool(Generic[Item, Result]):
    """A pool of threads (LAPACK and file access release the interpreter lock).

    Use as a context: inside it PyTorch computes with one thread, because small decompositions gain nothing from more
    and much from running side by side. Outside of it results are computed where they are asked for.
    """

    def __init__(self, function: Callable[[Item], Result]) -> None:
        """Compute ``function`` of items."""
        self._function = function
        self._waiting: deque[Item] = deque()
        self._running: dict[Item, Future[Result]] = {}
        self._cpus = _usable_cpus()
        self._workers = max(1, min(len(self._cpus), _MOST_WORKERS))
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 1

    def __enter__(self) -> "AheadPool[Item, Result]":
        """Start the threads."""
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self._workers, "xquant-factors", initializer=self._spread)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop them; give PyTorch its threads back."""
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._waiting.clear()
        self._running.clear()
        torch.set_num_threads(self._threads)

    def announce(self, items: Iterable[Item]) -> None:
        """Name the items that :meth:`take` will be asked for, in order."""
        self._waiting.extend(items)
        self._top_up()

    def take(self, item: Item) -> Result:
        """The result for an item, announced or not. Raises what the function raised."""
        future = self._running.pop(item, None)
        if future is None:
            with contextlib.suppress(ValueError):
                self._waiting.remove(item)
            return self._function(item)
        # Before waiting, so that no thread idles.
        self._top_up()
        return future.result()

    def _top_up(self) -> None:
        # No more than this, because every finished result is held until it is asked for.
        while self._pool is not None and self._waiting and len(self._running) <= self._workers:
            item = self._waiting.popleft()
            self._running[item] = self._pool.submit(self._function, item)

    def _spread(self) -> None:
        """Let a thread use all of the process's CPUs: vLLM pins the loading thread to one, and children inherit it."""
        with contextlib.suppress(AttributeError, OSError):
            os.sched_setaffinity(0, self._cpus)


def _usable_cpus() -> set[int]:
    """The CPUs of all threads of this process together."""
    try:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return set(range(os.cpu_count() or 1))
    cpus: set[int] = set()
    for thread in threads:
        with contextlib.suppress(OSError):
            cpus |= os.sched_getaffinity(thread)
    return cpus
