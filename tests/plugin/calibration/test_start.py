"""What vLLM's own configuration of an engine has calibrated, and what it does where that cannot be."""

import dataclasses
import logging
import signal

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import quantize_tiny_model, save_tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer
from xquant_vllm.errors import RefusedError
from xquant_vllm.plugin.calibration import child, start
from xquant_vllm.plugin.calibration.child import in_setting_words
from xquant_vllm.plugin.engine_factors import factors_of
from xquant_vllm.plugin.engine_settings import settings_of
from xquant_vllm.plugin.kept_folder import KEPT_KEY, kept_folder
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("models"), {}

    def model(family):
        if family not in made:
            made[family] = str(save_tiny_tokenizer(save_tiny_model(folder / family, family)))
        return made[family]

    return model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    """Short, so that a calibration takes seconds."""
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    return str(path)


@pytest.fixture
def said(monkeypatch):
    """Lines of the log, so far. vLLM may take handlers away while it makes a configuration."""
    lines = []
    monkeypatch.setattr(
        logging.getLogger("vllm.xquant_vllm"), "handle", lambda record: lines.append(record.getMessage())
    )
    return lambda: lines


@pytest.fixture
def asked(monkeypatch):
    """What would be calibrated."""
    requests = []

    def calibrate(request, folder, device, *, must_fit):
        requests.append(request)
        raise RefusedError("this is a test")

    monkeypatch.setattr(start, "calibrate", calibrate)
    return requests


def configure(model, xquant=None, **arguments):
    arguments = {"attention_backend": "xquant", "max_model_len": 512, "dtype": "bfloat16", **arguments}
    return EngineArgs(model=model, additional_config={"xquant": xquant or {}}, **arguments).create_engine_config()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"bits": 2}, id="head"),
        pytest.param({"bits": 3, "method": "xquant-cl"}, id="chain", marks=pytest.mark.nightly),
    ],
)
def test_the_first_start_calibrates_and_later_ones_find_it(models, text, said, settings, monkeypatch):
    settings = {**settings, "calibration": text}
    config = configure(models("llama"), settings)
    folder, header = factors_of(config)
    assert folder == kept_folder(config)
    assert header.calibration.text == "text.txt"
    assert settings_of(config).cache == "latent"
    assert settings_of(config).bits.key == settings["bits"]
    lines = "\n".join(said())
    assert f"xquant: calibrating {models('llama')} ({settings['bits']} bits" in lines
    assert "xquant: calibration: calibrate: sequence 1 of 1 done" in lines
    assert f"xquant: calibrated: factors in {folder}" in lines
    monkeypatch.setattr(start, "calibrate", None)
    # As vLLM does in the process of the engine.
    again = dataclasses.replace(config)
    assert settings_of(again) == settings_of(config)
    assert kept_folder(configure(models("llama"), settings)) == folder
    assert "xquant: calibrated before" in said()[-1]
    # Of damaged ones the header is looked at here.
    (folder / HEADER_FILE).write_text("{")
    with pytest.raises(TypeError):  # it would have been calibrated again
        configure(models("llama"), settings)
    assert not (folder / FACTORS_FILE).exists()


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llama", {}, None),
        ("llama", {"bits": 3}, (3, "xquant", "head")),
        ("llama", {"bits": 2, "calibration": "none"}, None),
        ("mqa", {"bits": 3}, (3, "xquant", "joint")),
        ("mha", {"bits": 2}, (2, "xquant", None)),
        ("llama", {"basis": "joint"}, (4, "xquant", "joint")),
        ("llama", {"method": "xquant-cl", "first_layers": 2}, (4, "xquant-cl", None)),
    ],
)
def test_what_is_asked_for_follows_from_settings_and_model(models, asked, family, settings, expected):
    config = configure(models(family), settings)
    assert [(request.bits, request.method, request.basis) for request in asked] == (
        [] if expected is None else [expected]
    )
    assert all(request.text == "mixed-text" for request in asked)
    assert [request.first_layers for request in asked if request.method == "xquant-cl"] in ([], [2])
    # What did not come about is served from the weights alone.
    assert KEPT_KEY not in config.additional_config


def test_auto_says_what_was_not_done(models, asked, said):
    configure(models("llama"), {"bits": 2})
    assert said()[-1] == (
        "xquant: not calibrated: factors are computed from the weights alone, which lose more at key 2 / value 2 bits: "
        "this is a test"
    )


def test_a_text_that_is_named_is_not_given_up_silently(models, asked):
    with pytest.raises(
        ValueError, match="'calibration': 'python-docs' cannot work: this is a test; set \"calibration\""
    ):
        configure(models("llama"), {"bits": 2, "calibration": "python-docs"})


def test_a_text_that_is_not_there_is_refused_in_one_sentence(models, asked):
    named = "xquant: setting 'calibration': '/no/text' cannot work: the file cannot be read .*; set \"calibration\": "
    with pytest.raises(ValueError, match=named):
        configure(models("llama"), {"calibration": "/no/text"})


@pytest.mark.parametrize(
    ("settings", "arguments", "named"),
    [
        ({"skip_layers": [1]}, {}, "'skip_layers' says itself"),
        ({"method": "xquant-cl"}, {"pipeline_parallel_size": 2}, "would cut the chain before layer 2"),
        ({}, {"load_format": "dummy"}, "--load-format dummy"),
        ({}, {"hf_overrides": {"rope_theta": 5e5}}, "--hf-overrides"),
        ({}, {"weight_transfer_config": {"backend": "nccl"}}, "--weight-transfer-config"),
    ],
)
def test_what_cannot_be_calibrated_is_known_before(models, asked, said, settings, arguments, named):
    settings = {"bits": 2, **settings}
    configure(models("llama"), settings, **arguments)
    (line,) = [line for line in said() if "not calibrated" in line]
    assert named in line
    with pytest.raises(ValueError, match="cannot work"):
        configure(models("llama"), {**settings, "calibration": "python-docs"}, **arguments)
    assert not asked


def test_quantized_checkpoints_are_not_run(tmp_path, asked, said):
    model = quantize_tiny_model(save_tiny_model(tmp_path / "model", "llama"))
    configure(str(model), {"bits": 2})
    assert any("the checkpoint is quantized" in line for line in said())
    assert not asked


def test_a_folder_with_factors_is_served_as_it_is(models, tmp_path, asked):
    from xquant_vllm.offline.factorize import FactorizeOptions, factorize

    factorize(FactorizeOptions(models("llama"), tmp_path / "out"))
    for calibration in ("auto", "none"):
        configure(str(tmp_path / "out"), {"bits": 2, "calibration": calibration})
    with pytest.raises(ValueError, match=r"'calibration': 'python-docs' cannot work: .* has factors, which are served"):
        configure(str(tmp_path / "out"), {"bits": 2, "calibration": "python-docs"})
    assert not asked


def test_a_configuration_that_is_made_of_an_engines_is_left_alone(models, asked):
    """A draft's, for one, which has the facts and the factors of the model that it is for."""
    config = configure(models("llama"), {"bits": 4})
    additional = {**config.additional_config, "xquant": {"bits": 2}}
    EngineArgs(
        model=models("mqa"), attention_backend="xquant", max_model_len=512, additional_config=additional
    ).create_engine_config()
    assert not asked
    noted = {**additional, KEPT_KEY: {"model": models("llama"), "folder": "/kept"}}
    draft = EngineArgs(
        model=models("mqa"), attention_backend="xquant", max_model_len=512, additional_config=noted
    ).create_engine_config()
    assert kept_folder(draft) is None


def test_a_model_that_transformers_cannot_calibrate_is_served_without(models, tmp_path, said):
    """Here it has no tokenizer."""
    model = str(save_tiny_model(tmp_path / "model", "llama"))
    configure(model, {"bits": 2})
    (line,) = [line for line in said() if "not calibrated" in line]
    assert "has no tokenizer that transformers can read" in line


@pytest.mark.parametrize(
    ("answer", "status", "expected"),
    [
        ("{}", 0, None),
        ('{"refused": "xquant: --calibration a.txt has 5 tokens"}', 0, "the calibration text a.txt has 5 tokens"),
        ("", -signal.SIGKILL, "died with exit status -9, which looks as if memory ran out (the last line)"),
        ("", 1, "died with exit status 1 (the last line)"),
    ],
)
def test_why_the_process_failed(answer, status, expected):
    found = child._refusal(answer, status, "the last line")
    assert found is None if expected is None else found.endswith(expected)


def test_a_servers_words_are_not_those_of_the_command_line():
    assert in_setting_words(
        "xquant: M cannot be calibrated; leave --calibration out for bases from the weights alone"
    ) == ('M cannot be calibrated; set "calibration": "none"')
    assert "--" not in in_setting_words(
        "xquant: --basis joint cannot work with --calibration on M: set --method xquant --basis head"
    )
