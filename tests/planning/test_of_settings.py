"""One cache planned from its settings: the row of a plan that `xquant plan` prints, and how its factors come about."""

from pathlib import Path

import pytest
import torch

from tests.planning.models import config_folder
from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import SettingsError
from xquant_vllm.offline.factorize import factorize
from xquant_vllm.offline.factorize_options import FactorizeOptions
from xquant_vllm.planning.caches import Kind
from xquant_vllm.planning.model_files import read_model, read_model_here
from xquant_vllm.planning.of_settings import plan_settings
from xquant_vllm.planning.options import by_kind
from xquant_vllm.planning.plan import PlanRequest, make_plan
from xquant_vllm.scheme.settings import parse_settings

MHA = {"num_key_value_heads": 4}
ONE_HEAD = {"num_key_value_heads": 1}


def planned(folder, settings, ranks=1):
    return plan_settings(read_model(str(folder)), parse_settings(settings), ranks, "cpu")


@pytest.mark.parametrize(
    ("config", "settings", "kind"),
    [
        ({}, {}, Kind("xquant", 4)),
        ({}, {"bits": 2}, Kind("xquant", 2, True)),
        ({}, {"bits": 2, "calibration": "none"}, Kind("xquant", 2)),
        ({}, {"bits": 4, "basis": "joint", "calibration": "none"}, Kind("joint", 4)),
        ({}, {"bits": 4, "basis": "joint"}, Kind("joint", 4, True)),
        ({}, {"bits": 3, "method": "xquant-cl"}, Kind("xquant-cl", 3, True)),
        (MHA, {}, Kind("x", 4)),
        (MHA, {"bits": 2}, Kind("joint", 2, True)),
        (ONE_HEAD, {"bits": 3}, Kind("joint", 3, True)),
    ],
)
def test_it_is_the_row_of_a_plan(tmp_path, config, settings, kind):
    folder = config_folder(tmp_path, **config)
    found = planned(folder, settings)
    assert found.kind == kind
    plan = make_plan(PlanRequest(model=folder, memory=64 << 20, context=1024))
    assert found.plain_bytes_per_token == plan.plain.bytes_per_token
    assert (found.choice is not None) is kind.calibrated
    row = by_kind(plan.options, kind)
    if row is not None:  # of one head a plan has no joint row
        assert found.bytes_per_token == row.bytes_per_token
        assert (None if found.loss is None else found.loss.increase) == row.loss


def test_ranks_have_their_own_heads(tmp_path):
    folder = config_folder(tmp_path)
    assert planned(folder, {}, ranks=2).bytes_per_token * 2 == planned(folder, {}).bytes_per_token


@pytest.mark.parametrize("settings", [{"group_size": 32}, {"bits": {"key": 4, "value": 2}}, {"rotate": False}])
def test_the_loss_of_other_settings_is_not_theirs(tmp_path, settings):
    assert planned(config_folder(tmp_path), settings).loss is None


def test_why_nothing_is_calibrated(tmp_path):
    folder = config_folder(tmp_path)
    assert "'group_size' says itself" in planned(folder, {"bits": 2, "group_size": 32}).not_calibrated
    with pytest.raises(SettingsError, match=r"'calibration': 'my\.txt' cannot work: the setting 'group_size'"):
        planned(folder, {"calibration": "my.txt", "group_size": 32})


def test_calibrated_factors_in_the_folder(tmp_path, monkeypatch):
    tokens = torch.randint(0, 200, (1, 256), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("xquant_vllm.offline.factorize.tokenize", lambda *_: tokens)
    out = tmp_path / "out"
    factorize(FactorizeOptions(save_tiny_model(tmp_path / "model", "llama"), out, bits=2, calibration="python-docs"))
    found = planned(out, {})
    assert found.built_in
    assert found.choice is None
    assert found.kind == Kind("xquant", 2, True)
    plan = make_plan(PlanRequest(model=str(out), memory=64 << 20, context=512))
    assert found.bytes_per_token == by_kind(plan.options, found.kind).bytes_per_token


def test_what_is_on_the_hub_is_not_fetched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read_model_here("nobody/has-this-one") is None
    assert not Path("nobody").exists()
