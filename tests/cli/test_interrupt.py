"""Ctrl-C: one line, exit status 130, and nothing half-written."""

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# Computes without end, so that a test can interrupt it wherever it wants to.
SLOW = """
import sys, time
import transformers
from tests.factorizing import FakeTokenizer
transformers.AutoTokenizer.from_pretrained = lambda _: FakeTokenizer()
import {module} as module
def wait(*_, **__):
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)
module.{function} = wait
from xquant_vllm.cli.main import main
sys.exit(main())
"""


def interrupted(module, function, *arguments):
    """Standard error of a command that is interrupted in a function."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(module=module, function=function), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What runs in the background of a shell inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        seen = ""
        while "waiting" not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert output == ""
    assert "Traceback" not in errors
    return errors.splitlines()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ((), "nothing was written"),
        (("--out", "{tmp}/r.json"), "nothing was written to {tmp}/r.json"),
        (("--resume", "{tmp}/scores"), "scores so far are in {tmp}/scores, and the same command goes on after them"),
    ],
)
def test_an_interrupted_evaluation_says_what_there_is(llama, tmp_path, options, left):
    options = [option.format(tmp=tmp_path) for option in options]
    model = "xquant_vllm.evaluation.model.hooked_model"
    command = ("eval", "perplexity", llama, "--window", 64, "--method", "kivi", *options)
    errors = interrupted(f"{model}", "HookedModel.logits", *command)
    assert errors[-1] == f"xquant: interrupted; {left.format(tmp=tmp_path)}"
    assert not list(tmp_path.iterdir())


def test_an_interrupted_factorization_leaves_nothing(llama, tmp_path):
    out = tmp_path / "a" / "out"
    errors = interrupted("xquant_vllm.offline.factorize", "write_json", "factorize", llama, "--out", out)
    assert errors[-1] == f"xquant: interrupted; nothing was written to {out}"
    assert not list(tmp_path.iterdir())
