"""examples/systemd: what systemd and vLLM make of it."""

import configparser
import http.server
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_process import free_port

from tests.docs.commands import check_serve

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "examples" / "systemd" / "xquant-vllm.service"
SETTINGS = ROOT / "examples" / "systemd" / "xquant-vllm.env"
ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture(scope="module")
def unit() -> configparser.RawConfigParser:
    """The unit, parsed."""
    parser = configparser.RawConfigParser(delimiters="=", comment_prefixes=("#", ";"))
    parser.optionxform = str
    parser.read_string(UNIT.read_text())
    return parser


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    """The variables that the unit reads from its file."""
    lines = [line for line in SETTINGS.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def _words(line: str, variables: dict[str, str]) -> list[str]:
    """A command as systemd makes it: ``$NAME`` alone is split into words, ``${NAME}`` is one or a part of one."""
    words = []
    for word in shlex.split(line):
        if re.fullmatch(r"\$[A-Z]+", word):
            words += variables[word[1:]].split()
        else:
            words.append(re.sub(r"\$\{([A-Z]+)\}", lambda found: variables[found[1]], word).replace("$$", "$"))
    return words


def test_the_unit_has_its_sections(unit):
    assert unit.sections() == ["Unit", "Service", "Install"]
    assert unit["Install"]["WantedBy"] == "multi-user.target"


@pytest.mark.skipif(ANALYZE is None, reason="there is no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    """With a command that exists in the place of vLLM's."""
    copied = tmp_path / UNIT.name
    copied.write_text(UNIT.read_text().replace("/opt/xquant/bin/vllm", "/bin/true"))
    command = [ANALYZE, "verify", "--man=no", str(copied)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, UNIT.name in done.stderr) == (0, False), done.stderr


def test_vllm_takes_the_command(unit, variables):
    program, *words = _words(unit["Service"]["ExecStart"], variables)
    assert Path(program).name == "vllm"
    check_serve(words)
    assert words[words.index("--attention-backend") + 1] == "xquant"


def test_what_is_written_is_in_the_units_own_folder(unit):
    service = unit["Service"]
    assert (service["ProtectSystem"], service["DynamicUser"]) == ("strict", "yes")
    folder = f"%C/{service['CacheDirectory']}"
    given = dict(pair.split("=", 1) for pair in service["Environment"].split())
    assert given["XDG_CACHE_HOME"] == given["HOME"] == service["WorkingDirectory"] == folder


def test_the_machine_code_that_is_written_at_run_time_may_run(unit):
    assert "MemoryDenyWriteExecute" not in unit["Service"]


def test_a_unit_that_cannot_work_is_given_up(unit):
    assert unit["Service"]["Restart"] == "on-failure"
    burst, interval = int(unit["Unit"]["StartLimitBurst"]), int(unit["Unit"]["StartLimitIntervalSec"])
    # A refused setting takes some twenty seconds until it is refused.
    assert burst * (int(unit["Service"]["RestartSec"]) + 60) < interval


@pytest.fixture
def healthy() -> Iterator[int]:
    """The port of something that says of itself that it is healthy."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def _wait(unit, variables, port: int, process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Run what waits for the server, with a process in the place of vLLM."""
    here = {**variables, "PORT": str(port), "MAINPID": str(process.pid)}
    command = _words(unit["Service"]["ExecStartPost"], here)
    return subprocess.run(command, env={"PATH": "/usr/bin:/bin", **here}, capture_output=True, timeout=20, check=False)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_start_ends_when_the_server_answers(unit, variables, healthy):
    with subprocess.Popen(["sleep", "60"]) as process:
        done = _wait(unit, variables, healthy, process)
        process.kill()
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_start_fails_when_the_server_has_ended(unit, variables):
    with subprocess.Popen(["true"]) as process:
        process.wait()
        done = _wait(unit, variables, free_port(), process)
    assert done.returncode == 1
