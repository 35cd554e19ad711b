"""One cache's turn: a server under the load, what it kept of it, and what it does when its engine core is killed."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serving.metrics import parse
from benchmarks.soak import factor_files, memory
from benchmarks.soak.caches import SoakedCache
from benchmarks.soak.client import Background, Outcome, send, send_all
from benchmarks.soak.drift import largest_difference
from benchmarks.soak.load import MAX_MODEL_LEN, MODEL_NAME, Load, Request, probe
from examples.vllm_process import Progress, ServerError, VllmServer, free_port

_HOST = "127.0.0.1"
_AT_ONCE = 12
# 640 tokens: three of the longest requests fit, a dozen run.
_BLOCKS, _BLOCK_SIZE = 20, 32
_IDLE_SECONDS, _END_SECONDS, _START_SECONDS = 60, 90, 300
# What only a first request allocates is no growth.
_WARM_UP = 16
_STEPS = 4


@dataclass
class Turn:
    """What was seen of one cache.

    Attributes:
        outcomes: of all requests, the probes and those beside the kill included.
        drift: the largest difference of the probe's log-probabilities from those of the first probe.
        leaked_blocks: still in use when nothing runs.
        growth: MiB by process and kind, under the load.
        growth_by_step: MiB of all processes after every quarter of the load.
        preemptions: in all.
        after_kill: what the server did when its engine core was gone; "" where it was not killed.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    drift: float = 0.0
    leaked_blocks: int = 0
    growth: dict[str, dict[str, float]] = field(default_factory=dict)
    growth_by_step: list[float] = field(default_factory=list)
    preemptions: int = 0
    after_kill: str = ""


class Soak:
    """A cache's turn."""

    def __init__(self, cache: SoakedCache, model: Path, logs: Path, load: Load) -> None:
        """Serve ``model`` with ``cache``, write logs into a folder, take requests from ``load``."""
        self._cache, self._model, self._logs, self._load = cache, model, logs, load
        self._first_probe: dict[str, Any] | None = None
        self._salts = 0
        self.turn = Turn()

    def run(self, requests: int) -> Turn:
        """Serve so many requests; then, if the cache is to be killed, kill it and start it again.

        Raises:
            ServerError: the server does not start, or does not end.
        """
        planned = self._load.requests(requests)
        shutil.rmtree(self._home, ignore_errors=True)
        with self._server("") as server:
            self._probe(server)
            self._send(server, self._load.requests(_WARM_UP))
            before = memory.resident(server.process.pid)
            for step in range(_STEPS):
                self._send(server, planned[step * requests // _STEPS : (step + 1) * requests // _STEPS])
                now = memory.total(memory.resident(server.process.pid))
                self.turn.growth_by_step.append(round(now - memory.total(before), 1))
            self._wait_until_idle(server)
            self.turn.growth = memory.growth(before, memory.resident(server.process.pid))
            self._probe(server)
            self._count(server)
            kept = factor_files.entries(self._factors)
            if self._cache.is_killed:
                self.turn.after_kill = self._kill(server)
        if self._cache.is_killed:
            with self._server("-restarted") as server:
                self._probe(server)
                self._send(server, self._load.requests(_WARM_UP))
                self._wait_until_idle(server)
                self._probe(server)
                self._count(server)
                faults = factor_files.faults(self._factors, kept, server.log_text())
                self.turn.outcomes += [Outcome("killed", fault) for fault in faults]
        return self.turn

    @property
    def _factors(self) -> Path:
        return self._home / "xquant_vllm"

    @property
    def _home(self) -> Path:
        """Of caches that are this turn's alone."""
        return self._logs / "home" / self._cache.name

    def _server(self, suffix: str) -> VllmServer:
        arguments = [str(self._model), "--served-model-name", MODEL_NAME, "--dtype", "float32", "--enforce-eager",
                     "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16", "--block-size", str(_BLOCK_SIZE),
                     "--num-gpu-blocks-override", str(_BLOCKS), "--kv-cache-memory-bytes", str(64 << 20),
                     *self._cache.flags()]  # fmt: skip
        log = self._logs / f"{self._cache.name}{suffix}.log"
        vllm_cache = os.environ.get("VLLM_CACHE_ROOT") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vllm"
        environment = {
            # For /reset_prefix_cache.
            "VLLM_SERVER_DEV_MODE": "1",
            "XDG_CACHE_HOME": str(self._home),
            # What vLLM itself keeps is everybody's: it starts faster with it.
            "VLLM_CACHE_ROOT": str(Path(vllm_cache).expanduser()),
        }
        server = VllmServer(arguments, log, free_port(), environment)
        try:
            server.wait(server.is_healthy, "it was ready", _START_SECONDS, Progress(f"{self._cache.name}{suffix}"))
        except BaseException:
            server.stop()
            raise
        return server

    def _send(self, server: VllmServer, requests: Sequence[Request]) -> None:
        self.turn.outcomes += send_all(requests, _HOST, server.port, _AT_ONCE)

    def _probe(self, server: VllmServer) -> None:
        self._salts += 1
        outcome = send(probe(str(self._salts)), _HOST, server.port)
        self.turn.outcomes.append(outcome)
        if outcome.answer is None:
            return
        logprobs = outcome.answer["choices"][0]["logprobs"]
        if self._first_probe is None:
            self._first_probe = logprobs
        self.turn.drift = max(self.turn.drift, largest_difference(self._first_probe, logprobs))

    def _wait_until_idle(self, server: VllmServer) -> None:
        deadline = time.monotonic() + _IDLE_SECONDS
        while time.monotonic() < deadline:
            now = _metrics(server)
            if now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"] == 0:
                return
            # Numbers are written after a step: of requests that were aborted since, only the next step tells.
            send(self._load.request("whole"), _HOST, server.port)
            time.sleep(0.2)
        raise ServerError(f"{self._cache.name}: requests still run {_IDLE_SECONDS} s after the last one was sent")

    def _count(self, server: VllmServer) -> None:
        """Read what is in use now that nothing runs; the probe before has brought the numbers up to date.

        Blocks that only the prefix cache remembers count as free. vLLM resets the prefix cache only if no block at all
        is in use, by a count of its own.
        """
        now = _metrics(server)
        self.turn.preemptions += int(now["vllm:num_preemptions_total"])
        self.turn.leaked_blocks += round(now["vllm:kv_cache_usage_perc"] * _BLOCKS)
        request = urllib.request.Request(f"{server.url}/reset_prefix_cache", method="POST")
        with urllib.request.urlopen(request, timeout=60):
            pass
        if found := re.search(r"some blocks \((\d+)\) are not freed", server.log_text()):
            self.turn.leaked_blocks = max(self.turn.leaked_blocks, int(found.group(1)))

    def _kill(self, server: VllmServer) -> str:
        """Kill the engine core under requests: clients must hear of it, and the server must not go on as if well."""
        core = memory.engine_core(server.process.pid)
        if core is None:
            raise ServerError(f"{self._cache.name}: no engine core in session {server.process.pid}")
        requests = [self._load.request(kind) for kind in ("whole", "stream", "several answers") * 3]
        # Long enough that all are under way.
        long = [Request(r.kind, _with_tokens(r.body, 300), r.streams, 300) for r in requests]
        under_way = Background(long, _HOST, server.port)
        time.sleep(0.5)
        os.kill(core, signal.SIGKILL)
        outcomes = under_way.wait()
        answered = [outcome for outcome in outcomes if not outcome.failure]
        deadline = time.monotonic() + _END_SECONDS
        while server.process.poll() is None and time.monotonic() < deadline:
            status = _status_of(f"{server.url}/health")
            if status >= 500:
                break
            time.sleep(0.2)
        else:
            if server.process.poll() is None:
                self.turn.outcomes.append(Outcome("killed", "the server says that it is well without its engine core"))
        ended = server.process.poll()
        stays = "the server stays and answers /health with 503"
        how = stays if ended is None else f"the server ends with code {ended}"
        return f"{len(outcomes) - len(answered)} of {len(outcomes)} requests get an error, {how}"


def _with_tokens(body: bytes, tokens: int) -> bytes:
    return json.dumps(json.loads(body) | {"max_tokens": tokens, "n": 1}).encode()


def _metrics(server: VllmServer) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        return parse(answer.read().decode())


def _status_of(url: str) -> int:
    """The status of an answer; 0 if nobody answers."""
    with contextlib.suppress(OSError):
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
    return 0
