"""What settings ask of a calibration, and what it yields for a whole model."""

import pytest
import torch

from tests.tiny_models import save_tiny_model
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.calibration.calibrated import CalibratedFactors, fit_layers
from xquant_vllm.offline.calibration.calibration_plan import plan_calibration
from xquant_vllm.offline.checkpoint import Checkpoint, open_checkpoint
from xquant_vllm.projection import refit
from xquant_vllm.projection.calibrated import layer_budget
from xquant_vllm.projection.predicted import PredictedLink
from xquant_vllm.scheme.layer_weights import LayerWeights
from xquant_vllm.scheme.settings import parse_settings

CHAIN = {"method": "xquant-cl"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By family: grouped queries with latents narrower than, as wide as and wider than the input of 128."""
    folder = tmp_path_factory.mktemp("models")
    return {name: open_checkpoint(str(save_tiny_model(folder / name, name))) for name in ("mqa", "llama", "mha")}


@pytest.mark.parametrize(
    ("family", "settings", "joint", "anchors"),
    [
        ("mqa", {}, False, "aaa"),
        ("llama", {}, False, "aaa"),
        ("mha", {}, True, "aaa"),
        ("mha", {"basis": "head"}, False, "aaa"),
        ("mqa", {"basis": "joint"}, True, "aaa"),
        ("mqa", CHAIN, True, "a--"),
        ("mha", {**CHAIN, "basis": "head"}, True, "a--"),
        ("llama", {**CHAIN, "anchor_interval": 2}, True, "a-a"),
        ("llama", {**CHAIN, "first_layers": 2}, True, "aa-"),
    ],
)
def test_what_settings_ask_for(checkpoints, family, settings, joint, anchors):
    checkpoint = checkpoints[family]
    plan = plan_calibration(checkpoint, parse_settings({**settings, "bits": 3}))
    assert plan.joint_kv is joint
    assert "".join("a" if anchor else "-" for anchor in plan.anchors) == anchors
    assert plan.budget == layer_budget(checkpoint.kv_heads, 32, 128, 3, joint_kv=joint)
    assert plan.layers_of_groups == [len(anchors[: i + 1]) - anchors.rindex("a", 0, i + 1) for i in range(3)]


@pytest.mark.parametrize("bits", [16, {"key": 4, "value": 2}])
def test_bits_that_no_budget_is_made_of_are_refused(checkpoints, bits):
    with pytest.raises(RefusedError, match=r"cannot work with --calibration, .*: set one number, 8, 4, 3 or 2$"):
        plan_calibration(checkpoints["mqa"], parse_settings({"bits": bits}))


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 2}, {**CHAIN, "bits": 2}, {"bits": 4, "basis": "joint"}])
@pytest.mark.parametrize("family", ["mqa", "mha"])
def test_a_whole_model_is_fitted_within_its_bytes(checkpoints, family, settings, monkeypatch):
    monkeypatch.setattr(refit, "_RIDGE", 1e12)  # what sinks read back as is another matter
    checkpoint = checkpoints[family]
    plan = plan_calibration(checkpoint, parse_settings(settings))
    batch = torch.arange(2 * 64).reshape(2, 64) * 7 % 300 + 3
    layers = dict(enumerate(fit_layers(checkpoint, plan, batch, torch.bfloat16, torch.device("cpu"))))
    factors = CalibratedFactors(layers)
    assert list(factors.allocations) == [0, 1, 2]
    for layer, allocation in factors.allocations.items():
        width = min(128, 2 * checkpoint.kv_heads * 32) if plan.joint_kv else 32
        taken = sum(AllocatedFormat(width, runs).bytes_per_token for runs in allocation)
        assert taken <= plan.budget
        # At eight bits there is nothing left to spend it on.
        assert taken > plan.budget - 8 or settings["bits"] == 8
        key, value = (weight.bfloat16() for weight in checkpoint.key_value(layer))
        weights = LayerWeights(layer, key, value, checkpoint.kv_heads)
        if plan.joint_kv:
            link = factors.layer_link(weights, plan.layers_of_groups[layer])
            assert isinstance(link, PredictedLink)
            own = link.up_key[:, -width:]
            rebuilt = (link.down.float() @ own).mT.flatten(0, 1)
            with pytest.raises(KeyError):
                factors.joint_kv_basis(weights)
        else:
            basis, _ = factors.layer_factors(weights)
            rebuilt = (basis.down.float() @ basis.up).mT.flatten(0, 1)
        # Against the weights as they are served, not as they are stored.
        assert (rebuilt - key.float()).norm() / key.float().norm() < 2e-2


@pytest.mark.parametrize("settings", [{}, CHAIN])
def test_what_is_fitted_is_the_weights_as_they_are_served(checkpoints, monkeypatch, settings):
    checkpoint, batch = checkpoints["mqa"], torch.arange(64).reshape(1, 64) * 7 % 300 + 3
    plan = plan_calibration(checkpoint, parse_settings(settings))

    def fitted():
        return list(fit_layers(checkpoint, plan, batch, torch.bfloat16, torch.device("cpu")))

    stored, key_value = fitted(), Checkpoint.key_value
    monkeypatch.setattr(Checkpoint, "key_value", lambda *a: tuple(w.bfloat16().float() for w in key_value(*a)))
    for one, other in zip(stored, fitted(), strict=True):
        assert one.allocation == other.allocation
        tensors = [
            (layer.factors.down, layer.factors.up_key)
            if isinstance(layer.factors, PredictedLink)
            else (layer.factors[0].down, layer.factors[0].up)
            for layer in (one, other)
        ]
        for mine, theirs in zip(*tensors, strict=True):
            assert torch.equal(mine, theirs)
