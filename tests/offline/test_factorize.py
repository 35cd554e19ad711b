"""``factorize`` called from Python."""

import dataclasses

import pytest
from safetensors.torch import load_file, save_file

from tests.factorizing import FakeTokenizer
from tests.tiny_models import save_tiny_model
from xquant_vllm.cli.main import main
from xquant_vllm.errors import RefusedError, SettingsError, XQuantError
from xquant_vllm.offline.factorize import FactorizeOptions, factorize
from xquant_vllm.scheme.factor_header import read_header


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


def test_it_returns_what_the_folder_says(model, tmp_path, capsys):
    header = factorize(FactorizeOptions(model, tmp_path / "out", bits=(4, 2), outlier_channels=2, dtype="float32"))
    assert header == read_header(tmp_path / "out")
    assert header.settings.bits.model_dump() == {"key": 4, "value": 2}
    assert header.settings.outlier_channels.model_dump() == {"key": 2, "value": 0}
    assert header.dtype == "float32"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "typed"),
    [
        ({}, ()),
        ({"basis": "joint", "rotate": False}, ("--basis", "joint", "--no-rotate")),
        (
            {"method": "xquant-cl", "calibration": "python-docs", "calibration_tokens": 64, "anchor_interval": 2},
            (
                "--method",
                "xquant-cl",
                "--calibration",
                "python-docs",
                "--calibration-tokens",
                "64",
                "--anchor-interval",
                "2",
            ),
        ),
    ],
)
def test_it_makes_what_the_command_makes(model, tmp_path, monkeypatch, options, typed):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    header = factorize(FactorizeOptions(str(model), tmp_path / "called", **options))
    assert main(["factorize", str(model), "--out", str(tmp_path / "typed"), "--no-certificate", *typed]) == 0
    assert header == read_header(tmp_path / "typed")


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"bits": 5}, RefusedError, "--bits 5 cannot work"),
        ({"bits": (4, 3, 2)}, RefusedError, "--bits takes one number, or one for keys and one for values, not 4 3 2"),
        ({"bits": ()}, RefusedError, "not none"),
        ({"method": "xquant-cl"}, RefusedError, "--method xquant-cl fits a chain to a text"),
        ({"first_layers": 1}, RefusedError, "--first-layers has no use"),
        ({"calibration": "python-docs", "calibration_tokens": 63}, RefusedError, "--calibration-tokens 63 is too few"),
        ({"outlier_channels": 32}, SettingsError, "'outlier_channels': 32"),
    ],
)
def test_its_errors_are_those_of_the_package(model, tmp_path, options, error, named):
    assert issubclass(error, XQuantError)
    with pytest.raises(error, match=named):
        factorize(FactorizeOptions(model, tmp_path / "out", **options))
    assert not list(tmp_path.iterdir())


def test_options_are_frozen(model, tmp_path):
    options = FactorizeOptions(model, tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.bits = 3
    assert dataclasses.replace(options, bits=3).bits == 3


@pytest.mark.parametrize(
    ("value", "dtype", "remedy"), [(float("nan"), "bfloat16", "anew"), (1e5, "float16", "bfloat16")]
)
@pytest.mark.parametrize("calibration", [None, "python-docs"])
def test_weights_that_are_no_numbers_are_refused_by_layer_and_tensor(
    tmp_path, monkeypatch, value, dtype, remedy, calibration
):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    model = save_tiny_model(tmp_path / "model", "llama")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][2, 3] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    named = rf"layer 1 cannot be factorized: model\.layers\.1\.self_attn\.v_proj\.weight has 1 .* \[2, 3\]; .*{remedy}"
    tokens = None if calibration is None else 64
    options = FactorizeOptions(model, tmp_path / "out", calibration, tokens, dtype=dtype)
    with pytest.raises(RefusedError, match=named):
        factorize(options)
    assert not (tmp_path / "out").exists()
