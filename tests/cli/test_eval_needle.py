"""``xquant eval needle``: what it prints, what it keeps, and what it refuses."""

import json

import pytest

from tests.factorizing import FakeTokenizer
from tests.tiny_models import save_tiny_model
from xquant_vllm.cli.main import main
from xquant_vllm.evaluation.model.hooked_model import HookedModel


def evaluate(model, *options):
    return main(["eval", "needle", str(model), *map(str, options)])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model that finds nothing."""
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    return save_tiny_model(tmp_path / "model", "llama")


@pytest.mark.nightly
def test_two_bits_find_less_than_sixteen(smollm2, capsys):
    options = ("--bits", 2, "--calibration", "none", "--lengths", 160, 240, "--depths", 0.2, 0.8, "--trials", 1)
    assert evaluate(smollm2, *options, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert (result["task"], result["method"], result["bits"]) == ("needle", "xquant", 2)
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [
        (160, 0.2),
        (160, 0.8),
        (240, 0.2),
        (240, 0.8),
    ]
    assert result["prompts"] == 4
    assert result["accuracy_16bit"] == 1
    assert result["relative_accuracy"] == result["accuracy"] < 1
    assert result["nll"] > 3 * result["nll_16bit"]
    assert (result["bytes_per_token"], result["bytes_per_token_16bit"]) == (3780, 23040)


def test_scores_are_kept_and_printed(tiny, tmp_path, capsys, monkeypatch):
    options = ("--lengths", 96, "--depths", 0, 1, "--trials", 2, "--calibration", "none", "--resume", tmp_path / "kept")
    assert evaluate(tiny, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "xquant on model: a number to find in python-docs, 2 prompts per length and depth"
    assert [line.split() for line in lines[2:5]] == [
        ["found,", "and", "with", "the", "16-bit", "cache"],
        ["tokens", "depth", "0", "depth", "1"],
        ["96", "0%", "(0%)", "0%", "(0%)"],
    ]
    assert lines[-1] == "bytes per token 252 (16 bit 768, 3.05 times fewer)"
    monkeypatch.setattr(HookedModel, "logits", None)
    assert evaluate(tiny, *options) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert evaluate(tiny, *options, "--method", "16bit", "--json") == 2
    assert "--calibration has no use with --method 16bit" in capsys.readouterr().err
    assert evaluate(tiny, *options[:-4], "--resume", tmp_path / "kept", "--method", "16bit", "--json") == 0
    assert json.loads(capsys.readouterr().out)["relative_accuracy"] is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--lengths", 2000), "--lengths 2000 is longer than the 1024 positions of this model; set 1024 or less"),
        (("--depths", -1), "--depths -1 cannot work"),
        (("--method", "kivi", "--bits", 5), "--bits 5 cannot work with --method kivi"),
        (("--text", "/nowhere.txt"), "--text /nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(tiny, capsys, options, named):
    assert evaluate(tiny, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xquant: ")
    assert named in line
