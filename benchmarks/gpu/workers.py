"""Processes that use the device, so that one that a kernel has broken can be replaced.

An illegal access leaves a CUDA context of which nothing else can be had. The suite itself therefore computes nothing on
the device. Processes are also what lets kernels compile side by side.
"""

import multiprocessing
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


class WorkerError(Exception):
    """A call has no result: it raised, its process died or hung, or it left the device unusable."""


def _serve(connection: Connection) -> None:
    """Answer calls with their result, an error and what is wrong with the device now, the last two None if nothing."""
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        result, error, broken = None, None, None
        try:
            result = function(*arguments)
        except Exception:
            error = traceback.format_exc(limit=-3)
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as why:
            broken = (str(why).splitlines() or [type(why).__name__])[0]
        connection.send((result, error, broken))


class Worker:
    """Calls functions in another process, or in this one."""

    def __init__(self, *, inline: bool = False) -> None:
        """Start nothing yet.

        Args:
            inline: call in this process.
        """
        self._inline = inline
        self._running: tuple[SpawnProcess, Connection] | None = None

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Any:
        """The function's result; the function must be one of a module, and arguments and result be picklable.

        A result that is a dictionary whose ``status`` is ``"failed"`` is returned also where the device broke.

        Raises:
            WorkerError: there is no result. The next call may have a new process.
        """
        if self._inline:
            return function(*arguments)
        if self._running is None:
            context = multiprocessing.get_context("spawn")
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._running = process, connection
        _, connection = self._running
        try:
            connection.send((function, arguments))
            if not connection.poll(timeout):
                self.close()
                raise WorkerError(f"nothing came back within {timeout:.0f} s")
            result, error, broken = connection.recv()
        except (EOFError, OSError) as why:
            self.close()
            raise WorkerError("its process died") from why
        if broken is not None:
            self.close()
            if isinstance(result, dict) and result.get("status") == "failed":
                return result
            raise WorkerError(f"the device was unusable afterwards: {broken}")
        if error is not None:
            raise WorkerError(error)
        return result

    def close(self) -> None:
        """End the process, if there is one."""
        if self._running is not None:
            process, connection = self._running
            self._running = None
            connection.close()
            process.kill()
            process.join()


def each(items: Sequence[Item], call: Callable[[Worker, Item], Any], *, processes: int) -> Iterator[tuple[Item, Any]]:
    """Call something for every item, with a worker, several side by side; yields what comes back as it does.

    Args:
        items: the items, in the order in which they are started.
        call: given a worker and an item; what it raises ends everything.
        processes: workers; 0: all in this process.
    """
    if processes < 1:
        worker = Worker(inline=True)
        for item in items:
            yield item, call(worker, item)
        return
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    done: queue.SimpleQueue[tuple[Item, Any, BaseException | None]] = queue.SimpleQueue()

    def serve() -> None:
        worker = Worker()
        try:
            while True:
                item = waiting.get_nowait()
                try:
                    done.put((item, call(worker, item), None))
                except BaseException as error:
                    done.put((item, None, error))
        except queue.Empty:
            worker.close()

    for _ in range(min(processes, len(items))):
        threading.Thread(target=serve, daemon=True).start()
    for _ in items:
        item, result, error = done.get()
        if error is not None:
            raise error
        yield item, result
