"""What standard error shows while a command runs: everything slow has a line or bar of its own, before the windows."""

import re
import time

import pytest

from xquant_vllm.cli.main import main
from xquant_vllm.evaluation.methods.served_cache import ServedCache
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.calibration import samples


@pytest.fixture(autouse=True)
def forget():
    """What an earlier calibration has found."""
    samples._last.clear()


SHORT = ("--window", "64", "--windows", "1")


def steps(errors):
    """Lines and the names of bars, in order, each once."""
    found = []
    for line in re.split("[\r\n]+", errors):
        step = re.sub(r": +\d+%.*", "", line)
        if step and step not in found:
            found.append(step)
    return found


def test_an_evaluation_shows_its_steps(llama, tokenizer, capsys):
    assert main(["eval", "perplexity", str(llama), *SHORT, "--calibration-tokens", "64"]) == 0
    assert steps(capsys.readouterr().err) == [
        "xquant: loading model in float32 to calibrate on 64 tokens",
        "calibrate",
        "fit",
        "xquant: loading model in float32",
        "prepare cache",
        "xquant",
    ]


def test_a_factorization_shows_its_steps(llama, tokenizer, tmp_path, capsys):
    options = ("--calibration", "python-docs", "--calibration-tokens", "64")
    assert main(["factorize", str(llama), "--out", str(tmp_path / "out"), *options]) == 0
    errors = capsys.readouterr().err
    assert steps(errors) == [
        "xquant: loading model in float32 to calibrate on 64 tokens",
        "calibrate",
        "factorize",
        "xquant: loading what was written in float32",
        "prepare cache",
        "measure",
    ]
    # The bar of the calibration is whole before the other one begins.
    assert errors.index("calibrate: 100%") < errors.index("factorize:")


@pytest.mark.parametrize(("what", "name"), [(HookedModel, "__init__"), (ServedCache, "__init__")])
def test_the_time_per_window_is_that_of_windows(llama, tokenizer, capsys, monkeypatch, what, name):
    whole = getattr(what, name)

    def slow(*arguments):
        time.sleep(3)
        whole(*arguments)

    monkeypatch.setattr(what, name, slow)
    assert main(["eval", "perplexity", str(llama), *SHORT, "--calibration", "none"]) == 0
    (seconds,) = re.findall(r"xquant: 100%.*1/1 \[00:(\d\d)<", capsys.readouterr().err)[-1:]
    assert int(seconds) < 3


@pytest.mark.parametrize(
    ("task", "options", "line"),
    [
        ("perplexity", SHORT, "16bit on model: 1 window of 64 tokens of python-docs"),
        (
            "needle",
            ("--lengths", "96", "--trials", "1"),
            "16bit on model: a number to find in python-docs, 1 prompt per length and depth",
        ),
    ],
)
def test_one_is_no_plural(llama, tokenizer, capsys, task, options, line):
    assert main(["eval", task, str(llama), *options, "--method", "16bit"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == line
