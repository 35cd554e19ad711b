"""Real vLLM engines for tests, in processes of their own, with results shared by the tests of a session."""

import hashlib
import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("engine_process.py")
_ENVIRONMENT = {
    # The engine runs in the process itself: no second start-up, and a failure has one traceback.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Variables that nothing reads while it is imported.
_READ_LATE = {"VLLM_CPU_OMP_THREADS_BIND"}
_TIMEOUT_S = 600
DEFAULTS = {
    "max_model_len": 1024,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,
    "seed": 0,
}


class EngineFailed(AssertionError):
    """The engine process ended with an error; ``log`` is all it printed."""

    def __init__(self, log: str) -> None:
        super().__init__(f"the engine process failed:\n{log[-6000:]}")
        self.log = log


@dataclass
class Result:
    """What an engine process answered."""

    cache_tokens: int
    capacity: int
    tasks: list[dict[str, Any]]
    log: str


class _Server:
    """A process that runs engines one after another, so that vLLM is imported once.

    ``how`` is ``"--serve"`` for all in that process, or ``"--fork"`` for each in a process that is forked from it.
    """

    def __init__(self, how: str, environment: dict[str, str]) -> None:
        self._forks = how == "--fork"
        self._process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), how],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def run(self, request: Path, result: Path, environment: dict[str, str]) -> str:
        """Run an engine; what it printed. Without a result it failed."""
        log = result.with_suffix(".log")
        more = f"\t{json.dumps(environment)}" if self._forks else ""
        self._process.stdin.write(f"{request}\t{result}\t{log}{more}\n")
        ready, _, _ = select.select([self._process.stdout], [], [], _TIMEOUT_S)
        answer = self._process.stdout.readline().split() if ready else []
        if answer[:1] != ["done"]:
            self.stop()
        if answer[1:] not in ([], ["0"]):  # the exit status of a process of its own
            result.unlink(missing_ok=True)
        return log.read_text() if log.exists() else ""

    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


class Engines:
    """Starts engines and remembers their answers."""

    def __init__(self, folder: Path) -> None:
        """Keep requests and results in ``folder``."""
        self._folder = folder
        # What one engine caches, the next one of this session finds; nothing is left in the user's own cache.
        self._environment = {**os.environ, **_ENVIRONMENT, "XDG_CACHE_HOME": str(folder / "cache")}
        self._results: dict[str, Result] = {}
        self._servers: dict[str, _Server] = {}

    def close(self) -> None:
        """End the processes that engines share."""
        for server in self._servers.values():
            server.stop()

    def run(
        self,
        model: Path,
        backend: str,
        tasks: list[dict[str, Any]],
        *,
        xquant: Any = None,
        kivi: Any = None,
        environment: dict[str, str] | None = None,
        **engine: Any,
    ) -> Result:
        """Run tasks on an engine; the same request is answered from memory.

        Args:
            model: checkpoint folder.
            backend: value of ``attention_backend``.
            tasks: see ``engine_process.py``.
            xquant: the xquant settings, or None to pass none. Unless they say otherwise nothing is calibrated, which
                most tests are not about.
            kivi: the kivi settings, likewise.
            environment: further environment variables.
            engine: further arguments of ``vllm.LLM``.

        Raises:
            EngineFailed: the process failed.
        """
        arguments = {**DEFAULTS, "model": str(model), "attention_backend": backend, **engine}
        if isinstance(xquant, dict):
            xquant = {**xquant, "calibration": xquant.get("calibration", "none")}
        additional = {key: value for key, value in (("xquant", xquant), ("kivi", kivi)) if value is not None}
        if additional:
            arguments["additional_config"] = additional
        request = json.dumps({"engine": arguments, "tasks": tasks, "environment": environment}, sort_keys=True)
        key = hashlib.sha256(request.encode()).hexdigest()[:16]
        if key not in self._results:
            # Engines share a process, which saves most of their time, except for what vLLM decides once per process and
            # what speculation leaves behind in it.
            alone = environment is not None or not arguments["enforce_eager"] or "speculative_config" in arguments
            self._results[key] = self._start(key, request, environment or {}, alone)
        return self._results[key]

    def _start(self, key: str, request: str, environment: dict[str, str], alone: bool) -> Result:
        request_path, result_path = self._folder / f"{key}.request.json", self._folder / f"{key}.result.json"
        request_path.write_text(request)
        if not environment.keys() <= _READ_LATE:
            log = self._alone(request_path, result_path, environment)
        else:
            log = self._server("--fork" if alone else "--serve").run(request_path, result_path, environment)
        if not result_path.exists():
            raise EngineFailed(log)
        answer = json.loads(result_path.read_text())
        return Result(answer["cache_tokens"], answer["capacity"], answer["tasks"], log)

    def _server(self, how: str) -> _Server:
        if how not in self._servers or not self._servers[how].running():
            self._servers[how] = _Server(how, self._environment)
        return self._servers[how]

    def _alone(self, request_path: Path, result_path: Path, environment: dict[str, str]) -> str:
        process = subprocess.run(
            [sys.executable, str(_SCRIPT), str(request_path), str(result_path)],
            env={**self._environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if process.returncode:
            result_path.unlink(missing_ok=True)
        return process.stdout
