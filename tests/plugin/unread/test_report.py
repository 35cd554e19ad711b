"""What vLLM's own configuration of a real engine says of settings that nobody reads."""

import logging
import multiprocessing

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import SettingsError
from xquant_vllm.offline.factorize import factorize
from xquant_vllm.offline.factorize_options import FactorizeOptions
from xquant_vllm.plugin import checks
from xquant_vllm.plugin.unread import report

X = {"xquant": {"bits": 8}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama"))


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("VLLM_ATTENTION_BACKEND", "XQUANT_BITS", "VLLM_DP_RANK"):
        monkeypatch.delenv(name, raising=False)


def configure(model, backend=None, **arguments):
    arguments = {"skip_tokenizer_init": True, "max_model_len": 512, "attention_backend": backend, **arguments}
    return EngineArgs(model=model, **arguments).create_engine_config()


def said(caplog, level=logging.WARNING):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "vllm.xquant_vllm" and record.levelno == level
    ]


@pytest.mark.parametrize(
    ("backend", "arguments"),
    [
        (None, {}),
        ("CPU_ATTN", {}),
        ("xquant", {}),
        ("xquant", {"additional_config": X}),
        ("kivi", {"additional_config": {"kivi": {"bits": 2}}}),
        (None, {"additional_config": X, "attention_config": {"backend": "XQUANT"}}),
        ("xquant", {"additional_config": {**X, "another_plugin": {"depth": 3}}}),
        ("xquant", {"hf_overrides": {"rope_theta": 10000.0}}),
    ],
)
def test_what_is_read_is_not_complained_about(tiny, caplog, backend, arguments):
    configure(tiny, backend, **arguments)
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("backend", "arguments", "parts"),
    [
        (None, {"additional_config": X}, ["'xquant' in --additional-config", "no --attention-backend is given"]),
        ("CPU_ATTN", {"additional_config": X}, ["'xquant' in --additional-config", "--attention-backend is CPU_ATTN"]),
        (None, {"additional_config": {"kivi": {}}}, ["add --attention-backend kivi"]),
        (None, {"hf_overrides": X}, ["'xquant' in --hf-overrides is not read", "--additional-config"]),
        ("xquant", {"additional_config": {**X, "kivi": {}}}, ["'kivi' in --additional-config", "has no effect with"]),
    ],
)
def test_one_warning_names_what_is_ignored_and_what_to_set(tiny, caplog, backend, arguments, parts):
    configure(tiny, backend, **arguments)
    (line,) = said(caplog)
    assert line.startswith("xquant: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("backend", "arguments", "parts"),
    [
        (
            "xquant",
            {"additional_config": {"bits": 2}},
            ["'bits'", """set --additional-config '{"xquant": {"bits": 2}}'"""],
        ),
        ("xquant", {"additional_config": {"XQUANT": {"bits": 2}}}, ["'XQUANT'", '{"xquant": {"bits": 2}}']),
        ("xquant", {"additional_config": {"xqaunt": {"bits": 2}}}, ["'xqaunt'", '{"xquant": {"bits": 2}}']),
        ("xquant", {"additional_config": {**X, "hot": 0}}, ["'hot'", '{"xquant": {"hot": 0, "bits": 8}}']),
        ("xquant", {"additional_config": {"kivi": {"bits": 2}}}, ["'kivi'", "set --attention-backend kivi"]),
        ("kivi", {"additional_config": X}, ["'xquant'", "set --attention-backend xquant"]),
        ("kivi", {"additional_config": {"residual": 64}}, ["'residual'", '{"kivi": {"residual": 64}}']),
        ("xquant", {"hf_overrides": X}, ["'xquant' in --hf-overrides is not read"]),
        ("xquant", {"additional_config": {"xquant": X}}, ["and not in another 'xquant' inside of it"]),
        ("xquant", {"additional_config": {"xquant": {"BITS": 2}}}, ["unknown setting 'BITS'; did you mean 'bits'?"]),
        ("xquant", {"additional_config": {"xquant": '{"bits": 2}'}}, ["is not a table of settings"]),
    ],
)
def test_what_can_only_be_meant_for_the_backend_is_refused(tiny, caplog, backend, arguments, parts):
    with pytest.raises(SettingsError) as error:
        configure(tiny, backend, **arguments)
    for part in parts:
        assert part in str(error.value)
    assert said(caplog, logging.ERROR) == str(error.value).splitlines()


def test_a_whole_string_is_refused_by_vllm_itself(tiny):
    with pytest.raises(ValueError, match="additional_config"):
        configure(tiny, "xquant", additional_config='{"xquant": {"bits": 2}}')


@pytest.mark.parametrize("backend", [None, "CPU_ATTN"])
def test_the_variable_that_vllm_does_not_read(tiny, caplog, monkeypatch, backend):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "XQUANT")
    assert configure(tiny, backend).attention_config.backend != "XQUANT"
    (line,) = said(caplog)
    assert "VLLM_ATTENTION_BACKEND=XQUANT has no effect" in line
    assert line.endswith("set --attention-backend xquant")


def test_the_variable_is_no_matter_where_the_backend_serves(tiny, caplog, monkeypatch):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "XQUANT")
    configure(tiny, "xquant")
    assert said(caplog) == []


@pytest.mark.parametrize("backend", [None, "xquant"])
def test_a_variable_that_nobody_reads(tiny, caplog, monkeypatch, backend):
    monkeypatch.setenv("XQUANT_BITS", "2")
    configure(tiny, backend)
    (line,) = said(caplog)
    assert "the environment variable XQUANT_BITS has no effect" in line


def test_factors_that_are_not_served(tmp_path, caplog):
    factorize(FactorizeOptions(save_tiny_model(tmp_path / "model", "llama"), tmp_path / "out", dtype="bfloat16"))
    configure(str(tmp_path / "out"), "xquant", dtype="bfloat16")
    assert said(caplog) == []
    configure(str(tmp_path / "out"), dtype="bfloat16")
    (line,) = said(caplog)
    assert f"the factors in {tmp_path / 'out'} have no effect, since no --attention-backend is given" in line


def test_the_connector_without_the_backend(tiny, caplog):
    connector = {
        "kv_connector": "XQuantConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": "xquant_vllm.plugin.connectors.connector",
        "kv_connector_extra_config": {"folder": "/tmp"},
    }
    configure(tiny, kv_transfer_config=connector)
    (line,) = said(caplog)
    assert "the KV connector XQuantConnector moves pages of this package's backend" in line


def test_a_setting_of_the_connector_that_nobody_reads(tiny, tmp_path):
    connector = {"kv_connector": "XQuantConnector", "kv_role": "kv_both"}
    extra = {"folder": str(tmp_path), "bits": 2}
    with pytest.raises(SettingsError, match="kv_connector_extra_config: unknown setting 'bits'"):
        configure(tiny, "xquant", kv_transfer_config={**connector, "kv_connector_extra_config": extra})
    with pytest.raises(ValueError, match="folder"):
        configure(tiny, "xquant", kv_transfer_config={**connector, "folder": str(tmp_path)})


def test_drafts_without_layers(tiny, caplog):
    draft = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    configure(tiny, "xquant", speculative_config={**draft, "attention_backend": "xquant"})
    (line,) = said(caplog)
    assert '"attention_backend": "xquant" in --speculative-config has no effect' in line


def test_settings_that_only_a_draft_reads_are_read(tiny, caplog):
    draft = {"model": tiny, "num_speculative_tokens": 2, "attention_backend": "xquant"}
    configure(tiny, additional_config=X, speculative_config=draft)
    assert said(caplog) == []


def test_processes_beside_the_first_say_nothing(tiny, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.current_process(), "_name", "ApiServer_1")
        configure(tiny, additional_config=X)
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_DP_RANK", "1")
        configure(tiny, additional_config=X)
    assert said(caplog) == []


def test_vllm_names_its_api_servers_so():
    import inspect

    from vllm.v1.utils import APIServerProcessManager

    assert report._API_SERVER in inspect.getsource(APIServerProcessManager)


def test_a_fault_of_ours_does_not_end_the_server_of_another_backend(tiny, caplog, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(report, "lost_elsewhere", fail)
    configure(tiny, "CPU_ATTN")
    with pytest.raises(RuntimeError, match="a fault"):
        configure(tiny, "xquant")


def test_it_is_said_before_minutes_go_into_calibration_and_once(tiny, caplog, monkeypatch):
    told = []
    monkeypatch.setattr(checks, "calibrate_at_start", lambda *_: told.append(said(caplog)) or False)
    with pytest.raises(SettingsError, match="'bits' in --additional-config is not read"):
        configure(tiny, "xquant", additional_config={"bits": 2})
    assert not told
    caplog.clear()
    configure(tiny, "xquant", additional_config={**X, "kivi": {}})
    assert told == [said(caplog)]
    assert len(told[0]) == 1
