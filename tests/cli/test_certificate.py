"""The certificate that ``xquant factorize`` ends with, and the bound that can be demanded of it."""

import json

import pytest

from tests.factorizing import factorize
from xquant_vllm.cli.main import main
from xquant_vllm.errors import FactorFileError
from xquant_vllm.planning.caches import Kind
from xquant_vllm.planning.model_files import read_model
from xquant_vllm.planning.of_settings import plan_settings
from xquant_vllm.projection.factor_file import HEADER_FILE
from xquant_vllm.scheme.factor_header import read_header
from xquant_vllm.scheme.settings import XQuantSettings

pytestmark = pytest.mark.usefixtures("tokenizer")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and so on " * 1000, encoding="utf-8")
    return path


def certificate_in(folder):
    return read_header(folder).certificate


def evaluated(folder, text, capsys):
    """What `xquant eval` finds on the same tokens: the windows of the certificate, one after another."""
    capsys.readouterr()
    options = [
        "--method",
        "xquant",
        "--text",
        str(text),
        "--window",
        "512",
        "--windows",
        "8",
        "--stride",
        "511",
        "--json",
    ]
    assert main(["eval", "perplexity", str(folder), *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_is_what_eval_finds(llama, text, tmp_path, capsys):
    out = tmp_path / "out"
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{number * number % 977}" for number in range(511 * 8)), encoding="utf-8")
    options = ("--calibration", text, "--bits", 2, "--certificate-text", other)
    assert factorize(llama, out, *options) == 0
    printed = capsys.readouterr().out
    found = certificate_in(out)
    assert f"measured {found.describe()}" in printed
    assert found.text == "other.txt"
    assert found.dtype == "float32"
    result = evaluated(out, other, capsys)
    assert found.tokens == result["tokens"]
    assert found.bytes_per_token == result["bytes_per_token"]
    assert found.kl.mean == pytest.approx(result["kl"], rel=1e-4)
    assert found.increase.mean == pytest.approx(result["increase"], rel=1e-3)
    assert found.top1.mean == pytest.approx(result["top1_agreement"])


def test_inspect_and_plan_show_it(llama, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert factorize(llama, out, "--calibration", text, "--bits", 2, "--certificate-text", text) == 0
    found = certificate_in(out)
    assert main(["inspect", str(out)]) == 0
    assert f"measured loss {found.describe()}" in capsys.readouterr().out
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certificate"] == found.model_dump()
    assert main(["plan", str(out), "--memory", "64MiB", "--context", "512", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (option,) = [option for option in plan["options"] if option["calibrated"]]
    assert (option["loss"], option["loss_kl"]) == (found.increase.mean, found.kl.mean)
    served = plan_settings(read_model(str(out)), XQuantSettings(), 1, "cpu")
    assert served.kind == Kind("xquant", 2, True)
    assert served.loss.kl == found.kl.mean


def test_it_cannot_be_changed(llama, text, tmp_path):
    out = tmp_path / "out"
    assert factorize(llama, out, "--calibration", text, "--certificate-text", text) == 0
    content = json.loads((out / HEADER_FILE).read_text())
    content["certificate"]["kl"]["mean"] = 0.0
    (out / HEADER_FILE).write_text(json.dumps(content))
    with pytest.raises(FactorFileError, match="its checksum does not match"):
        read_header(out)


def test_without_one(llama, text, tmp_path, capsys, monkeypatch):
    assert factorize(llama, tmp_path / "out", "--calibration", text, "--no-certificate") == 0
    assert certificate_in(tmp_path / "out") is None
    assert "measured" not in capsys.readouterr().out
    monkeypatch.setattr("xquant_vllm.evaluation.tasks.certify.memory_problem", lambda *_: "it takes 99 GB")
    assert main(["factorize", str(llama), "--out", str(tmp_path / "more"), "--calibration", str(text)]) == 0
    assert "what it loses was not measured: it takes 99 GB" in capsys.readouterr().err
    assert certificate_in(tmp_path / "more") is None


def test_the_fewest_bytes_within_a_bound(llama, text, tmp_path, capsys):
    """Of the same cache at all bits the bound lies between the second and the third."""
    highs = {}
    for bits in (2, 3, 4):
        out = tmp_path / f"bits-{bits}"
        options = ("--calibration", text, "--basis", "head", "--bits", bits, "--certificate-text", text)
        assert factorize(llama, out, *options) == 0
        highs[bits] = certificate_in(out).kl.high
    assert highs[4] < highs[3] < highs[2]
    bound = (highs[3] + highs[4]) / 2
    options = ("--calibration", text, "--certificate-text", text, "--max-kl", bound)
    assert factorize(llama, tmp_path / "head", *options, "--basis", "head") == 0
    header = read_header(tmp_path / "head")
    assert header.settings.bits.key == 4
    assert header.certificate.kl.high <= bound
    assert "3 bits, method xquant, basis head: on letters.txt" in capsys.readouterr().err
    # Joint latents and chains lose less in the same bytes.
    assert factorize(llama, tmp_path / "any", *options) == 0
    any_of_them = read_header(tmp_path / "any")
    assert any_of_them.certificate.bytes_per_token <= header.certificate.bytes_per_token
    assert any_of_them.certificate.kl.high <= bound


def test_a_bound_that_nothing_meets_leaves_nothing(llama, text, tmp_path, capsys):
    options = ("--calibration", text, "--certificate-text", text, "--max-kl", 1e-12, "--basis", "head")
    assert factorize(llama, tmp_path / "out", *options) == 2
    assert "xquant: --max-kl 1e-12 cannot be met" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"letters.txt"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--max-kl", "0.1"], "--max-kl chooses among calibrated caches; give --calibration"),
        (["--max-kl", "0", "--calibration", "mixed-text"], "--max-kl 0 cannot work; set more than 0"),
        (["--max-kl", "nan", "--calibration", "mixed-text"], "--max-kl nan cannot work"),
        (["--max-kl", "0.1", "--calibration", "mixed-text", "--bits", "4"], "--bits cannot work with --max-kl"),
        (["--max-kl", "0.1", "--calibration", "mixed-text", "--no-certificate"], "--no-certificate cannot work"),
        (["--certificate-text", "a.txt", "--no-certificate"], "--certificate-text has no use with --no-certificate"),
        (["--certificate-text", "/not/there"], "--certificate-text /not/there cannot be read"),
    ],
)
def test_what_cannot_work_is_refused(llama, tmp_path, capsys, options, named):
    assert factorize(llama, tmp_path / "out", *options) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_that_cannot_be_read_is_told_before_the_model_runs(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("xquant_vllm.cli.factorize.factorize", None)
    options = ("--calibration", "mixed-text", "--certificate-text", tmp_path)
    assert factorize(llama, tmp_path / "out", *options) == 2
    assert "--certificate-text" in capsys.readouterr().err
