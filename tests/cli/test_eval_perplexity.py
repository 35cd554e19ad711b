"""``xquant eval perplexity``: what it prints and writes, how it goes on after it was killed, and what it refuses."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import ROOT
from tests.factorizing import FakeTokenizer, factorize
from tests.tiny_models import save_tiny_model
from xquant_vllm.cli.main import main
from xquant_vllm.evaluation.model.hooked_model import HookedModel

SMALL = ("--window", "64", "--windows", "2")


def evaluate(model, *options):
    return main(["eval", "perplexity", str(model), *map(str, options)])


def result_of(capsys, model, *options):
    assert evaluate(model, *SMALL, "--json", *options) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def models(family: str):
        if family not in made:
            made[family] = save_tiny_model(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return models


@pytest.fixture
def fake_tokenizer(monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())


def test_the_result_is_one_line_of_json(smollm2, tmp_path, capsys):
    out = tmp_path / "results" / "one.json"
    options = ("--window", 96, "--windows", 2, "--stride", 50, "--bits", 4, 3, "--calibration", "none", "--out", out)
    assert evaluate(smollm2, *options, "--json") == 0
    output = capsys.readouterr()
    (line,) = output.out.splitlines()
    assert "2/2" in output.err
    result = json.loads(line)
    assert json.loads(out.read_text()) == result
    assert [file.name for file in out.parent.iterdir()] == ["one.json"]
    assert {name: result[name] for name in ("method", "bits", "model", "text", "window", "windows", "stride")} == {
        "method": "xquant",
        "bits": {"key": 4, "value": 3},
        "model": smollm2.name,
        "text": "python-docs",
        "window": 96,
        "windows": 2,
        "stride": 50,
    }
    assert result["tokens"] == 2 * 95
    assert result["bytes_per_token_16bit"] == 23040
    assert result["bytes_per_token"] == 30 * 3 * ((64 * 4 / 8 + 4 + 2) + (64 * 3 / 8 + 4))
    assert result["increase"] == pytest.approx(result["perplexity"] - result["perplexity_16bit"])
    assert math.prod(result["window_perplexities"]) ** 0.5 == pytest.approx(result["perplexity"])
    assert math.prod(result["window_perplexities_16bit"]) ** 0.5 == pytest.approx(result["perplexity_16bit"])
    assert 0 < result["kl"] < 0.3
    assert 0.7 < result["top1_agreement"] < 1
    assert set(result["versions"]) == {"xquant_vllm", "torch", "transformers", "python"}
    assert result["settings"]["basis"] == "head"
    assert result["settings"]["factors"]["calibration"] is None


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kivi", ("--residual", 32, "--group-size", 16)),
        ("kivi-pre-rope", ()),
        ("paper-xquant", ()),
        ("paper-xquant-cl", ()),
        ("turboquant", ()),
        ("xquant", ("--basis", "joint", "--settings", '{"outlier_channels": 2}')),
        ("xquant-cl", ()),
    ],
)
def test_every_method_loses_less_with_more_bits(models, fake_tokenizer, capsys, method, options):
    exact = result_of(capsys, models("llama"), "--method", "16bit")
    assert (exact["increase"], exact["kl"], exact["top1_agreement"]) == (0, 0, 1)
    options = ("--method", method, *options)
    fine, coarse = (result_of(capsys, models("llama"), *options, "--bits", bits) for bits in (8, 2))
    assert fine["perplexity_16bit"] == coarse["perplexity_16bit"] == exact["perplexity"]
    assert 0 < fine["kl"] < coarse["kl"] / 10
    assert coarse["bytes_per_token"] < fine["bytes_per_token"] < exact["bytes_per_token"] == 3 * 2 * 2 * 64


@pytest.mark.parametrize("options", [("--basis", "joint"), ("--method", "xquant-cl")])
def test_a_folder_of_factors_is_evaluated_as_if_it_were_made_at_once(models, fake_tokenizer, tmp_path, capsys, options):
    calibration = ("--calibration", "python-docs", "--calibration-tokens", 256)
    built_in = (*options, *calibration, "--bits", 3, "--dtype", "float32")
    assert factorize(models("mqa"), tmp_path / "folder", *built_in) == 0
    capsys.readouterr()
    at_once = result_of(capsys, models("mqa"), *options, *calibration, "--bits", 3)
    of_folder = result_of(capsys, tmp_path / "folder", *options)
    assert of_folder["kl"] == pytest.approx(at_once["kl"], rel=1e-3)
    assert of_folder["bits"] == 3
    assert of_folder["settings"]["factors"]["calibration"] == {"text": "python-docs", "tokens": 256}
    data_free = result_of(capsys, models("mqa"), *options, "--calibration", "none", "--bits", 3)
    assert data_free["kl"] != pytest.approx(at_once["kl"], rel=1e-3)
    assert evaluate(tmp_path / "folder", *SMALL, *options, *calibration) == 2
    assert "has factors, which are evaluated as they are; leave it out" in capsys.readouterr().err
    other = "xquant" if "xquant-cl" in options else "xquant-cl"
    assert evaluate(tmp_path / "folder", *SMALL, "--method", other) == 2
    assert "leave the option out" in capsys.readouterr().err


def test_a_summary_is_for_reading(models, fake_tokenizer, capsys):
    assert evaluate(models("mha"), *SMALL, "--bits", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "xquant on model: 2 windows of 64 tokens of python-docs"
    assert re.fullmatch(r"perplexity +\d+\.\d+ +\d+\.\d+ +[+-]\d+\.\d+", lines[2])
    assert re.fullmatch(r"bytes per token +204 +1536 +7\.53 times fewer", lines[3])


WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = None
import transformers
from tests.factorizing import FakeTokenizer
transformers.AutoTokenizer.from_pretrained = lambda _: FakeTokenizer()
from xquant_vllm.cli.main import main
sys.exit(main())
"""


def test_it_goes_on_where_it_was_killed_and_needs_no_vllm(models, fake_tokenizer, tmp_path, capsys, monkeypatch):
    kept, windows = tmp_path / "kept", 60
    options = ["--window", "128", "--windows", str(windows), "--stride", "64", "--resume", str(kept), "--json"]
    arguments = ["eval", "perplexity", str(models("llama")), *options, "--calibration", "none"]
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_VLLM, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while len(list(kept.glob("xquant-*/window-*.json"))) < 2:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(list(kept.glob("xquant-*/window-*.json")))
    assert 2 <= done < windows

    runs = []
    logits = HookedModel.logits
    monkeypatch.setattr(HookedModel, "logits", lambda *given: runs.append(1) or logits(*given))
    assert main(arguments) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert len(runs) == 2 * (windows - done)
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == resumed
    # The 16-bit cache by itself is there, too.
    assert evaluate(models("llama"), *options, "--method", "16bit") == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == resumed["perplexity_16bit"]
    assert len(runs) == 2 * (windows - done)
    at_once = [*arguments[:3], *options[:6], "--calibration", "none", "--json"]
    assert main(at_once) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(resumed["perplexity"], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("llama", ("--text", "/nowhere.txt"), "--text /nowhere.txt cannot be read as UTF-8 text"),
        ("llama", ("--window", 2000), "--window 2000 is longer than the 1024 positions of this model; set 1024"),
        ("llama", ("--windows", 10000), "the text python-docs has "),
        ("llama", ("--method", "kivi", "--bits", 5), "--bits 5 cannot work with --method kivi"),
        ("llama", ("--method", "kivi", "--bits", 4, 2), "--bits 4 2 cannot work with --method kivi"),
        ("llama", ("--method", "turboquant", "--bits", 16), "set one of 8, 4, 3, 2"),
        ("llama", ("--method", "16bit", "--bits", 4), "--bits has no use with --method 16bit"),
        ("llama", ("--method", "turboquant", "--group-size", 32), "--group-size has no use with --method turboquant"),
        ("llama", ("--method", "kivi", "--group-size", 0), "--group-size 0 cannot work"),
        ("llama", ("--residual", 128), "--residual has no use with --method xquant"),
        ("llama", ("--method", "kivi", "--residual", -1), "--residual -1 cannot work"),
        ("llama", ("--method", "kivi", "--calibration", "none"), "--calibration has no use with --method kivi"),
        ("llama", ("--bits", 5), "no page format has 5-bit codes"),
        ("llama", ("--bits", 4, 3, 2), "--bits takes one number, or one for keys and one for values"),
        ("llama", ("--bits", 4, "--settings", '{"bits": 3}'), "--settings has 'bits': 3, but --bits says 4"),
        (
            "llama",
            ("--settings", '{"prompt": "exact"}'),
            'would tell nothing of the cache; set "cached" or leave it out',
        ),
        ("llama", ("--settings", '{"hot": "20%"}'), "a pool of hot blocks holds the same; set 0 or leave it out"),
        ("llama", ("--settings", '{"outlier_channel": 3}'), "did you mean 'outlier_channels'"),
        ("llama", ("--settings", '{"skip_layers": [7]}'), "'skip_layers': [7] cannot work: the model has 3 layers"),
        ("llama", ("--group-size", 24), "xquant: --group-size 24 cannot work: it does not divide"),
        ("llama", ("--calibration", "/nowhere.txt"), "--calibration /nowhere.txt cannot be read"),
        ("llama", ("--calibration-tokens", 3), "--calibration-tokens 3 is too few"),
        (
            "mqa",
            ("--method", "xquant-cl", "--settings", '{"skip_layers": [1]}', "--calibration", "python-docs"),
            "'skip_layers' cannot work with --calibration python-docs",
        ),
        (
            "gemma3",
            ("--method", "xquant-cl"),
            "xquant: --method xquant-cl cannot work on this model, whose kinds of layers",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(models, fake_tokenizer, capsys, family, options, named):
    folder = models(family)
    capsys.readouterr()  # what making it has printed
    assert evaluate(folder, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert line.startswith("xquant: ")


@pytest.mark.parametrize("method", ["kivi", "xquant-cl"])
def test_a_model_that_transformers_cannot_run_is_refused(models, fake_tokenizer, tmp_path, capsys, method):
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    assert evaluate(folder, *SMALL, "--method", method) == 2
    assert "xquant: transformers cannot run the LlamaForCausalLM" in capsys.readouterr().err.splitlines()[-1]


def test_results_that_cannot_be_written_are_refused(models, fake_tokenizer, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert evaluate(models("llama"), *SMALL, "--method", "16bit", "--out", tmp_path / "file" / "result.json") == 2
    assert "xquant: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_settings_that_are_no_table_are_refused(models, capsys, text):
    with pytest.raises(SystemExit):
        evaluate(models("llama"), "--settings", text)
    assert "--settings" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_refused(models, fake_tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(HookedModel, "logits", lambda _, tokens, *__: torch.full((len(tokens), 5), math.nan))
    monkeypatch.setattr(FakeTokenizer, "encode", lambda *_, **__: [1] * 200)
    assert evaluate(models("llama"), *SMALL, "--method", "kivi") == 2
    assert "yields numbers that are not finite; set --dtype float32" in capsys.readouterr().err.splitlines()[-1]


def test_by_position(llama, tokenizer, tmp_path, capsys):
    options = ("--window", 64, "--windows", 2, "--bits", 2, "--calibration", "none", "--resume", tmp_path / "kept")
    assert evaluate(llama, *options, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert "positions" not in plain
    for _ in range(2):  # the second time from what was kept
        assert evaluate(llama, *options, "--position-buckets", 4, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        positions = result.pop("positions")
        assert result["kl"] == pytest.approx(plain["kl"])
        assert result["window_perplexities"] == pytest.approx(plain["window_perplexities"])
        assert [row["last"] for row in positions] == [15, 31, 47, 63]
        assert sum(row["kl"] * (row["last"] - row["first"] + 1) for row in positions) / 63 == pytest.approx(plain["kl"])
    assert evaluate(llama, *options, "--position-buckets", 4) == 0
    assert "48-63" in capsys.readouterr().out


@pytest.mark.parametrize("buckets", [0, -1, 64])
def test_buckets_that_cannot_be(llama, tokenizer, capsys, buckets):
    assert evaluate(llama, "--window", 64, "--position-buckets", buckets) == 2
    assert f"xquant: --position-buckets {buckets} cannot work" in capsys.readouterr().err
