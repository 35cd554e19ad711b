"""`xquant serve` says each step, and becomes `vllm serve`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xquant_vllm.cli import serve
from xquant_vllm.cli.main import main


@pytest.fixture
def replaced(monkeypatch):
    """Programs that took the place of this process."""
    programs = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: programs.append((path, arguments)))
    return programs


def test_it_becomes_vllm_serve(replaced, capsys):
    options = ["--bits", "2", "--method", "xquant", "--basis", "joint", "--calibration", "my.txt"]
    assert main(["serve", "MODEL", *options, "--port", "8001", "--seed", "3"]) == 0
    ((path, arguments),) = replaced
    assert Path(path).name == "vllm"
    assert arguments[:5] == [path, "serve", "MODEL", "--attention-backend", "xquant"]
    assert json.loads(arguments[6]) == {
        "xquant": {"bits": 2, "method": "xquant", "basis": "joint", "calibration": "my.txt"}
    }
    assert arguments[7:] == ["--port", "8001", "--seed", "3"]
    plan, factors, command = capsys.readouterr().err.splitlines()
    assert plan.startswith("xquant: step 1 of 3, plan: MODEL with bits 2, ")
    assert "step 2 of 3, factors: calibrated on my.txt by the server's first start" in factors
    assert "step 3 of 3, serve: vllm serve MODEL --attention-backend xquant " in command


def test_without_options_there_are_no_settings(replaced):
    assert main(["serve", "MODEL"]) == 0
    assert replaced[0][1][1:] == ["serve", "MODEL", "--attention-backend", "xquant"]


def test_two_numbers_of_bits(replaced):
    assert main(["serve", "MODEL", "--bits", "4", "2"]) == 0
    assert json.loads(replaced[0][1][-1]) == {"xquant": {"bits": {"key": 4, "value": 2}}}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["MODEL", "--bits", "5"], "xquant: --bits 5 cannot work: no page format has 5-bit codes"),
        (["MODEL", "--additional-config", '{"xquant": {"bitz": 4}}'], "unknown setting 'bitz'; did you mean 'bits'?"),
        (["MODEL", "--bits", "2", "--additional-config", '{"xquant": {"bits": 3}}'], "--bits says 2, but"),
    ],
)
def test_what_cannot_work_is_refused_before_vllm_starts(replaced, capsys, arguments, named):
    assert main(["serve", *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not replaced


def test_the_model_comes_first(replaced, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--port", "8000", "MODEL"])
    assert "name the model first" in capsys.readouterr().err
    assert not replaced


def test_a_missing_vllm_is_named(replaced, capsys, monkeypatch):
    monkeypatch.setattr(serve.sys, "executable", "/nowhere/python")
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda _: None)
    assert main(["serve", "MODEL"]) == 2
    assert capsys.readouterr().err == (
        "xquant: serve needs vLLM, which is not installed in this environment; install it beside xquant-vllm\n"
    )


def test_it_is_the_same_process_afterwards(tmp_path):
    """Signals reach the server, and its exit status is that of the command: here a program stands in for vLLM."""
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "vllm").write_text(
        f"#!{sys.executable}\nimport os, sys\nprint(os.getpid(), *sys.argv[1:])\nsys.exit(7)\n"
    )
    (tmp_path / "vllm").chmod(0o755)
    code = (
        f"import os, sys; sys.executable = {str(tmp_path / 'python')!r}; from xquant_vllm.cli.main import main; "
        "print(os.getpid(), flush=True); sys.exit(main(['serve', 'MODEL', '--port', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    first, second = done.stdout.splitlines()
    assert done.returncode == 7, done.stderr
    assert second == f"{first} serve MODEL --attention-backend xquant --port 1"
