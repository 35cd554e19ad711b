"""What `xquant serve` says before it serves."""

import pytest

from tests.planning.models import config_folder
from xquant_vllm.cli.serve_steps import serve_steps
from xquant_vllm.errors import SettingsError
from xquant_vllm.scheme.settings import parse_settings


def steps(model, settings=None, rest=()):
    settings = settings or {}
    return serve_steps(str(model), settings, parse_settings(settings), rest)


def test_sizes_and_losses_are_told(tmp_path):
    plan, factors = steps(config_folder(tmp_path))
    assert "with the default settings: xquant, per head, 4 bits: " in plan
    assert " bytes per token, 2,048 at 16 bit (" in plan
    assert " in perplexity (of " in plan
    assert factors == "computed from the weights alone by the server's first start, and kept for later ones"


@pytest.mark.parametrize("rest", [["-tp", "2"], ["--tensor_parallel_size=2"], ["--port", "1", "-tp=2"]])
def test_of_one_rank(tmp_path, rest):
    assert ", 1,024 at 16 bit (" in steps(config_folder(tmp_path), rest=rest)[0]


def test_what_is_calibrated(tmp_path):
    plan, factors = steps(config_folder(tmp_path), {"bits": 2})
    assert "2 bits, calibrated: " in plan
    assert factors.startswith("calibrated on mixed-text by the server's first start, which takes minutes")
    plan, factors = steps(config_folder(tmp_path), {"bits": 2, "group_size": 32})
    assert "2 bits: " in plan
    assert "what it loses was not measured" in plan
    assert "not calibrated, because the setting 'group_size'" in factors


def test_keys_and_values_of_different_bits(tmp_path):
    assert (
        "xquant, per head, key 4 / value 2 bits: "
        in steps(config_folder(tmp_path), {"bits": {"key": 4, "value": 2}})[0]
    )


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"'calibration': 'my\.txt' cannot work"):
        steps(config_folder(tmp_path), {"calibration": "my.txt", "rotate": False})


def test_what_is_not_here_is_left_to_vllm(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan, factors = steps("nobody/has-this-one", {"bits": 2})
    assert plan == "nobody/has-this-one with bits 2; it is not on this machine yet, so sizes are told when it is"
    assert "calibrated by the server's first start where that loses less" in factors
    (tmp_path / "config.json").write_text("[", encoding="utf-8")
    assert "; no sizes (" in steps(tmp_path)[0]
