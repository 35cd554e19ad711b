"""Several engines at once, each in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.methods import Method

ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineError(Exception):
    """An engine did not start or stopped; the message says which, and what it wrote last."""


class Engine:
    """One engine.

    Attributes:
        module: what its process runs.
    """

    module = "benchmarks.offline.engine"

    def __init__(self, method: Method, arguments: dict[str, Any], logs: Path) -> None:
        """Start it; :meth:`ready` waits for it."""
        self.method = method
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"{method.name}.log"
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, json.dumps({**arguments, **method.engine})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": paths},
            )

    def ready(self) -> dict[str, Any]:
        """Wait until the model is loaded; what the engine says of its cache."""
        return self._answer()

    def run(self, what: str, **order: Any) -> dict[str, Any]:
        """Give an order and wait; see :mod:`benchmarks.offline.engine`."""
        assert self._process.stdin is not None
        self.wake()
        with contextlib.suppress(BrokenPipeError):  # _answer says why
            print(json.dumps({"what": what, **order}), file=self._process.stdin, flush=True)
        answer = self._answer()
        self.freeze()
        return answer

    def freeze(self) -> None:
        """Let none of its threads run, so that it takes nothing from the others, nor keeps a core awake for them."""
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it run again."""
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self.wake()
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        lines = self._log.read_text().splitlines()
        errors = [text for text in lines if "Error" in text] or lines or ["nothing was written"]
        raise EngineError(f"{self.method.label}: {errors[-1].strip()} (all of it: {self._log})")


class Engines:
    """Engines of several methods, alive together and ended together."""

    def __init__(
        self, methods: Sequence[Method], arguments: dict[str, Any], logs: Path, start: type[Engine] = Engine
    ) -> None:
        """Start one after the other: together they would only wait for each other's compiler.

        A method that this platform does not have is left out, and ``absent`` says why.
        """
        self.engines: list[Engine] = []
        self.cache_tokens: dict[str, int] = {}
        self.absent: dict[str, str] = {}
        for method in methods:
            engine = start(method, arguments, logs)
            try:
                self.cache_tokens[method.name] = engine.ready()["cache_tokens"]
                engine.freeze()
            except EngineError as error:
                self.absent[method.name] = str(error)
                engine.stop()
            except BaseException:
                engine.stop()
                self.stop()
                raise
            else:
                self.engines.append(engine)

    def __enter__(self) -> "Engines":
        """All of them."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all of them."""
        self.stop()

    def stop(self) -> None:
        """End all of them."""
        for engine in self.engines:
            engine.stop()
