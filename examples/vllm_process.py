"""A `vllm serve` child process: started, watched through its log, and stopped without leaving anything behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

# Lines of vLLM's log that tell how far it is -> what to say.
_MILESTONES = {
    r"Resolved architecture: (\w+)": r"read the configuration of a \1",
    r"Initializing a V1 LLM engine": "starting the engine",
    r"Starting to load model": "loading the weights",
    r"(xquant: .*)": r"\1",
    r"(Loading weights took .*)": r"\1",
    r"Warming up model for the compilation": "compiling the model, a minute or two the first time",
    r"(\w+ KV cache size: [\d,]+ tokens)": r"\1",
    r"Starting vLLM server": "opening the port",
}
# vLLM may hang instead of ending when its engine process fails.
_FAILED = r"EngineCore failed to start|Engine core initialization failed|EngineCore encountered a fatal error"
# The line a traceback closes on; pydantic's has a first line without content.
_REASON = re.compile(
    r"(?:^|\] +|\s)(?:(?:\w+\.)*ValidationError: .*\n.*Value error, (.+?) \[type=|((?:\w+\.)*\w*Error: .+)$)",
    re.MULTILINE,
)
_PR_SET_PDEATHSIG = 1


class ServerError(Exception):
    """The server did not do what was asked; the message says what, and where its log is."""


def free_port() -> int:
    """A TCP port on this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Refuse a port that is taken: vLLM would find out only after loading the model."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerError(f"port {port} cannot be used ({error.strerror}); give another one with --port") from None


def vllm_command() -> str:
    """The `vllm` command of the Python that runs this."""
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if not found:
        raise ServerError(f"there is no vllm command beside {sys.executable}; run: make venv")
    return found


def _before_exec() -> None:
    """In the child: have the kernel end it if this process is killed outright, and undo an ignored Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


class VllmServer:
    """One server in a session of its own, its output in a log file. Use it as a context: leaving stops the server."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        port: int,
        environment: dict[str, str] | None = None,
        program: list[str] | None = None,
    ) -> None:
        self.port = port
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        program = program or [vllm_command(), "serve"]
        command = [*program, *arguments, "--host", "127.0.0.1", "--port", str(port)]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        self.started = time.monotonic()
        with log.open("w") as output:
            print("$", *command, file=output, flush=True)
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=_before_exec,
            )

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.port}"

    def log_text(self) -> str:
        """All that the server has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def tail(self, lines: int = 30) -> str:
        """The end of the log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def find(self, pattern: str) -> re.Match[str] | None:
        """The first place in the log that matches."""
        return re.search(pattern, self.log_text())

    def last_news(self) -> str:
        """How far the server is, by the last line of its log that tells."""
        for line in reversed(self.log_text().splitlines()):
            for pattern, news in _MILESTONES.items():
                if found := re.search(pattern, line):
                    return found.expand(news)
        return "starting Python and vLLM"

    def _reason(self) -> str:
        """The end of an error message: the first error in the log, which causes the others, and where the log is."""
        found = _REASON.search(self.log_text())
        reason = (found.group(1) or found.group(2)).strip()[:400] if found else ""
        return f" ({reason}); its log is {self.log}" if reason else f"; its log is {self.log}"

    def is_healthy(self) -> bool:
        """Whether the server answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait(self, condition: Callable[[], object], what: str, timeout: float, progress: Progress) -> float:
        """Wait until the condition holds, showing progress; returns the seconds since the start.

        Raises:
            ServerError: the server ended first, or time is up.
        """
        with progress:
            while not condition():
                seconds = time.monotonic() - self.started
                code = self.process.poll()
                if code is not None:
                    raise ServerError(f"vLLM ended with exit code {code} before {what}{self._reason()}")
                if self.find(_FAILED):
                    raise ServerError(f"vLLM's engine failed before {what}{self._reason()}")
                if seconds > timeout:
                    raise ServerError(f"vLLM took longer than {timeout:.0f} s until {what}{self._reason()}")
                progress.show(seconds, self.last_news())
                time.sleep(0.5)
        return time.monotonic() - self.started

    def _left(self) -> list[int]:
        """Processes of the server's session that still run."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(entry.name))
        return found

    def _ended_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None and not self._left():
                return True
            time.sleep(0.1)
        return False

    def stop(self) -> bool:
        """End the server and all its processes; returns whether it went by itself when asked.

        While vLLM starts it overhears some signals, so it is asked several times.
        """
        for ask in (signal.SIGINT, signal.SIGTERM) * 2:
            if self.process.poll() is None:
                self.process.send_signal(ask)
            if self._ended_within(4):
                return True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # A killed process must get a processor once more, to give its memory back.
        if not self._ended_within(60):
            raise ServerError(f"processes {self._left()} of vLLM do not end, not even when killed")
        return False


class Progress:
    """Progress on stderr: one line that is rewritten on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.terminal = sys.stderr.isatty()
        self.next_line = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, seconds: float, news: str) -> None:
        """Show the time so far and what is going on."""
        line = f"{self.title} {seconds:4.0f} s  {news}"
        if self.terminal:
            print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        elif seconds >= self.next_line:
            print(line[:160], file=sys.stderr, flush=True)
            self.next_line = seconds + 10
