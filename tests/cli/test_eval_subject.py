"""``xquant eval --through vllm``: what is refused before an engine starts, and what is left behind."""

import tempfile
from contextlib import contextmanager

import pytest
import torch

from tests.factorizing import FakeTokenizer, factorize
from tests.tiny_models import save_tiny_model
from xquant_vllm.cli import eval_subject
from xquant_vllm.cli.main import main
from xquant_vllm.scheme.factor_header import read_header


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    return save_tiny_model(tmp_path / "model", "llama")


def evaluate(model, *options):
    windows = () if "--window" in options else ("--window", 64)
    return main(["eval", "perplexity", str(model), "--through", "vllm", *map(str, (*windows, *options))])


def refusal(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xquant: ")
    return line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--method", "kivi"), "--through vllm serves no --method kivi, which is a baseline"),
        (("--window", 1024), "--window 1024 is longer than the 1023 positions of this model that vLLM can fill"),
        (("--device", "cuda"), "--device cuda"),
        (("--bits", 5), "no page format has 5-bit codes"),
        (("--bits", 16, "--calibration", "python-docs"), "--bits cannot work with --calibration python-docs"),
        (("--calibration-tokens", 3), "--calibration-tokens 3 is too few"),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(tiny, capsys, options, named):
    assert evaluate(tiny, *options) == 2
    assert named in refusal(capsys)


def test_a_machine_without_vllm_is_told_so(tiny, capsys, monkeypatch):
    monkeypatch.setattr(eval_subject, "vllm_version", lambda: None)
    assert evaluate(tiny) == 2
    assert "--through vllm: vLLM is not installed" in refusal(capsys)


def test_a_folder_is_served_in_the_dtype_of_its_factors_only(tiny, tmp_path, capsys):
    assert factorize(tiny, tmp_path / "folder", "--dtype", "bfloat16") == 0
    capsys.readouterr()
    assert evaluate(tmp_path / "folder") == 2
    assert "has factors for bfloat16; set --dtype bfloat16" in refusal(capsys)


@pytest.mark.parametrize(("method", "bits", "basis"), [("xquant", 3, "head"), ("xquant-cl", 2, "joint")])
def test_what_is_calibrated_for_vllm_is_gone_afterwards(tiny, tmp_path, capsys, monkeypatch, method, bits, basis):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    served = []

    class FakeEngine:
        bytes_per_token = 100

        def reference(self, tokens, last=None):
            return torch.zeros(len(tokens), 320)

        candidate = reference

    @contextmanager
    def serve(folder, settings, dtype, windows, unit):
        served.append((read_header(folder), settings, dtype, [len(window) for window in windows]))
        yield FakeEngine()

    monkeypatch.setattr(eval_subject, "serve", serve)
    options = ("--method", method, "--bits", bits, "--calibration-tokens", 128)
    assert evaluate(tiny, *options, "--windows", 2) == 0
    ((header, settings, dtype, lengths),) = served
    assert (header.calibration.text, header.calibration.tokens, header.dtype) == ("python-docs", 128, "float32")
    assert (header.settings.bits.key, header.settings.basis) == (bits, basis)
    assert (settings, dtype, lengths) == ({"method": method, "bits": bits}, "float32", [64, 64])
    assert not list((tmp_path / "temporary").iterdir())
    assert "bytes per token          100" in capsys.readouterr().out
