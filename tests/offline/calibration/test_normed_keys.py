"""Models that normalize the keys of all heads together: their latents are cached behind that norm, and fitted so."""

import pytest
import torch

from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.calibration import samples
from xquant_vllm.offline.calibration.calibration_plan import plan_calibration
from xquant_vllm.offline.calibration.samples import collect_samples
from xquant_vllm.offline.checkpoint import Checkpoint, open_checkpoint
from xquant_vllm.scheme.settings import parse_settings

CPU = torch.device("cpu")
BATCH = torch.arange(2 * 40).reshape(2, 40) * 7 % 300 + 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(str(save_tiny_model(tmp_path_factory.mktemp("olmoe"), "olmoe-gqa")))


def test_the_norm_is_told_from_the_checkpoint(checkpoint, tmp_path):
    assert all(checkpoint.keys_normed_together(layer) for layer in range(checkpoint.layers))
    for family in ("qwen3", "command-r-plus", "llama"):
        other = open_checkpoint(str(save_tiny_model(tmp_path / family, family)))
        assert not other.keys_normed_together(0)


def test_gradients_are_those_behind_the_norm(checkpoint, monkeypatch):
    """Through the derivative of the norm they are those before it."""
    samples._last.clear()
    behind = collect_samples(checkpoint, BATCH, CPU)
    samples._last.clear()
    monkeypatch.setattr(Checkpoint, "keys_normed_together", lambda self, layer: False)
    before = collect_samples(checkpoint, BATCH, CPU)
    for layer, (normed, plain) in enumerate(zip(behind, before, strict=True)):
        assert torch.equal(normed.hidden, plain.hidden)
        assert plain.key_factor is None
        key, _ = checkpoint.key_value(layer)
        keys = normed.hidden @ key.T
        factor = torch.rsqrt(keys.square().mean(1) + checkpoint.config["rms_norm_eps"])
        torch.testing.assert_close(normed.key_factor, factor)
        unit, gradient, factor = keys * factor[:, None], normed.key_gradient, factor[:, None]
        expected = factor * (gradient - unit * (unit * gradient).mean(1, keepdim=True))
        assert (expected - plain.key_gradient).norm() < 1e-4 * plain.key_gradient.norm()
        torch.testing.assert_close(normed.value_gradient, plain.value_gradient)
    samples._last.clear()


@pytest.mark.parametrize(
    ("settings", "named"), [({"method": "xquant-cl"}, "--method xquant-cl"), ({"basis": "joint"}, "--basis joint")]
)
def test_joint_latents_are_refused_by_name(checkpoint, settings, named):
    with pytest.raises(RefusedError, match=f"{named} cannot work with --calibration on .*: set --method xquant"):
        plan_calibration(checkpoint, parse_settings(settings))


def test_a_narrow_model_gets_a_basis_per_head(tmp_path):
    """Which would get a joint one for its few input channels."""
    narrow = open_checkpoint(str(save_tiny_model(tmp_path, "olmoe")))
    assert not plan_calibration(narrow, parse_settings({})).joint_kv
