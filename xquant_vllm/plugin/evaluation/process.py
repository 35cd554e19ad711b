"""An evaluation engine in a process of its own: what vLLM keeps per process, and its memory, end with it."""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from xquant_vllm.errors import EngineError, SettingsError, cause_of
from xquant_vllm.plugin.evaluation.engine import EngineRequest, EvaluationEngine

_STARTED, _ANSWERED, _REFUSED, _FAILED = "started", "answered", "refused", "failed"


class EngineProcess:
    """Starts the process, asks it, ends it.

    Attributes:
        bytes_per_token: bytes of a token in all layers' pages.
    """

    def __init__(
        self, request: EngineRequest, start: Callable[[EngineRequest], EvaluationEngine] = EvaluationEngine
    ) -> None:
        """Start the engine and wait for it.

        Args:
            request: which engine.
            start: starts it, in the process.

        Raises:
            SettingsError: this package refuses the model or a setting.
            EngineError: vLLM failed.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, request, start), name="xquant-evaluation")
        with _no_interrupt():
            self._process.start()
        theirs.close()
        try:
            self.bytes_per_token: int = self._receive(_STARTED)
        except BaseException:
            self.close(at_once=True)
            raise

    def hidden_states(self, window: Sequence[int]) -> torch.Tensor:
        """See :meth:`EvaluationEngine.hidden_states`."""
        self._connection.send(("hidden_states", list(window)))
        return self._receive_tensor()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See :meth:`EvaluationEngine.logits`."""
        self._connection.send(("logits", None))
        _send_tensor(self._connection, hidden)
        return self._receive_tensor()

    def close(self, at_once: bool = False) -> None:
        """End the process.

        Args:
            at_once: whatever it is doing.
        """
        self._connection.close()
        self._process.join(timeout=0 if at_once else 10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> "EngineProcess":
        """For use in ``with``."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process; at once if an error or Ctrl-C ends its use."""
        self.close(at_once=kind is not None)

    def _receive_tensor(self) -> torch.Tensor:
        self._receive(_ANSWERED)
        return _receive_tensor(self._connection)

    def _receive(self, expected: str) -> Any:
        try:
            kind, content = self._connection.recv()
        except EOFError:
            self._process.join()
            status = self._process.exitcode
            # Linux kills what asks for more memory than there is.
            likely = ", which looks as if memory ran out" if status == -signal.SIGKILL else ""
            raise EngineError(
                f"xquant: the vLLM engine died with exit status {status}{likely}; "
                "what it printed stands above, and VLLM_LOGGING_LEVEL=INFO shows more"
            ) from None
        if kind == _REFUSED:
            raise SettingsError(content)
        if kind == _FAILED:
            cause, log = content
            raise EngineError(
                f"xquant: the vLLM engine failed: {cause}; the traceback is in {log}, and "
                "VLLM_LOGGING_LEVEL=INFO shows more"
            )
        assert kind == expected, kind
        return content


def _main(connection: Connection, request: EngineRequest, start: Callable[[EngineRequest], EvaluationEngine]) -> None:
    """The engine's process: answer until the other end is closed."""
    # What vLLM prints is no result of the command.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        engine = start(request)
        connection.send((_STARTED, engine.bytes_per_token))
        while True:
            method, window = connection.recv()
            if method == "hidden_states":
                answer = engine.hidden_states(window)
            else:
                answer = engine.logits(_receive_tensor(connection))
            connection.send((_ANSWERED, None))
            _send_tensor(connection, answer)
    except EOFError:
        return
    except Exception as error:
        # vLLM's configuration wraps errors of this package into its own.
        ours = [line[line.index("xquant: ") :] for line in str(error).splitlines() if "xquant: " in line]
        connection.send(
            (_REFUSED, "\n".join(ours)) if ours else (_FAILED, (cause_of(error), _keep(traceback.format_exc())))
        )


def _keep(text: str) -> str:
    """Write a text to a file that stays, and return its path."""
    handle, path = tempfile.mkstemp(prefix="xquant-engine-", suffix=".log")
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return path


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes that are started here do not see Ctrl-C, which their terminal sends to all: this one ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _send_tensor(connection: Connection, tensor: torch.Tensor) -> None:
    """Send a tensor as bytes: PyTorch's own way takes shared memory, of which containers have little."""
    tensor = tensor.cpu().contiguous()
    connection.send((tensor.dtype, tensor.shape))
    connection.send_bytes(tensor.view(torch.uint8).numpy().data.cast("B"))


def _receive_tensor(connection: Connection) -> torch.Tensor:
    dtype, shape = connection.recv()
    tensor = torch.empty(shape, dtype=dtype)
    connection.recv_bytes_into(tensor.view(torch.uint8).numpy().data.cast("B"))
    return tensor
