"""Real vLLM engines for tests, each in a process of its own, with results shared by the tests of a session."""

import hashlib
import json
import os
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
    tasks: list[dict[str, Any]]
    log: str


class Engines:
    """Starts engines and remembers their answers."""

    def __init__(self, folder: Path) -> None:
        """Keep requests and results in ``folder``."""
        self._folder = folder
        self._results: dict[str, Result] = {}

    def run(
        self,
        model: Path,
        backend: str,
        tasks: list[dict[str, Any]],
        *,
        xquant: Any = None,
        environment: dict[str, str] | None = None,
        **engine: Any,
    ) -> Result:
        """Run tasks on an engine; the same request is answered from memory.

        Args:
            model: checkpoint folder.
            backend: value of ``attention_backend``.
            tasks: see ``engine_process.py``.
            xquant: the xquant settings, or None to pass none.
            environment: further environment variables.
            engine: further arguments of ``vllm.LLM``.

        Raises:
            EngineFailed: the process failed.
        """
        arguments = {**DEFAULTS, "model": str(model), "attention_backend": backend, **engine}
        if xquant is not None:
            arguments["additional_config"] = {"xquant": xquant}
        request = json.dumps({"engine": arguments, "tasks": tasks, "environment": environment}, sort_keys=True)
        key = hashlib.sha256(request.encode()).hexdigest()[:16]
        if key not in self._results:
            self._results[key] = self._start(key, request, environment or {})
        return self._results[key]

    def _start(self, key: str, request: str, environment: dict[str, str]) -> Result:
        request_path, result_path = self._folder / f"{key}.request.json", self._folder / f"{key}.result.json"
        request_path.write_text(request)
        process = subprocess.run(
            [sys.executable, str(_SCRIPT), str(request_path), str(result_path)],
            # What one engine caches, the next one of this session finds; nothing is left in the user's own cache.
            env={**os.environ, **_ENVIRONMENT, "XDG_CACHE_HOME": str(self._folder / "cache"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        if process.returncode or not result_path.exists():
            raise EngineFailed(process.stdout)
        answer = json.loads(result_path.read_text())
        return Result(answer["cache_tokens"], answer["tasks"], process.stdout)
