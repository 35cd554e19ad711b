"""Facts that a process of its own finds out, whatever becomes of that process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xquant_vllm.diagnosis.child import find_out

PROBE = """
import os, signal, sys, time
from xquant_vllm.diagnosis.child import tell

def fail():
    raise KeyError("no such thing")

def end(number):
    os.kill(os.getpid(), number)

def main():
    print("noise of a library")
    tell(iter((
        ("arguments", lambda: sys.argv[2:]),
        ("noise", lambda: print("more noise") or os.write(1, b"and more\\n")),
        ("failing", fail),
        ("missing", lambda: __import__("no_such_module")),
        ("ending", lambda: {
            "segfault": lambda: end(signal.SIGSEGV),
            "illegal": lambda: end(signal.SIGILL),
            "exit": lambda: os._exit(3),
            "hang": lambda: time.sleep(600),
        }.get(sys.argv[2], str)()),
        ("last", lambda: {"paths": sys.path}),
    )))
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    (tmp_path / "some_probe.py").write_text(PROBE)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + (f":{before}" if before else ""))
    return "some_probe"


def test_sections_and_errors_are_told_apart(probe):
    found = find_out(probe, "nothing", "more")
    assert found.ended is None
    assert found.sections["arguments"] == ["nothing", "more"]
    assert found.sections["noise"] == 9
    assert found.errors == {
        "failing": "KeyError: 'no such thing'",
        "missing": "ModuleNotFoundError: No module named 'no_such_module'",
    }


def test_the_working_directory_is_no_place_to_import_from(probe, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    (work / "json.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(work)
    found = find_out(probe, "nothing")
    assert found.ended is None
    assert str(work) not in found.sections["last"]["paths"]
    assert "" not in found.sections["last"]["paths"]


@pytest.mark.parametrize(
    ("how", "why"),
    [("segfault", "ended by SIGSEGV"), ("illegal", "ended by SIGILL"), ("exit", "ended with exit status 3: and more")],
)
def test_what_was_found_before_the_end_is_kept(probe, how, why):
    found = find_out(probe, how)
    assert found.ended == why
    assert found.sections["arguments"] == [how]
    assert "last" not in found.sections


def test_a_process_that_hangs_is_ended(probe):
    began = time.monotonic()
    found = find_out(probe, "hang", seconds=3)
    assert found.ended == "took more than 3 seconds"
    assert time.monotonic() - began < 30
    assert found.sections["arguments"] == ["hang"]


def test_a_module_that_cannot_be_imported():
    found = find_out("no_such_probe")
    assert found.ended == "ended with exit status 1: ModuleNotFoundError: No module named 'no_such_probe'"
    assert found.sections == {}


def test_ctrl_c_ends_the_process(probe, tmp_path):
    # A shell starts what runs in its background with Ctrl-C ignored.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; from xquant_vllm.diagnosis.child import find_out; find_out({probe!r}, 'hang')"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (child := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{child[0]}").exists()


def test_what_is_cut_off_is_passed_over():
    from xquant_vllm.diagnosis.child import _told

    whole = json.dumps(["name", 1, None])
    assert list(_told(f"{whole}\n{whole[:5]}".encode())) == [("name", 1, None)]
