"""How much of a text a model is calibrated on."""

import pytest
import torch

from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.calibration import calibration_tokens
from xquant_vllm.offline.calibration.calibration_tokens import check_calibration_tokens, default_tokens


@pytest.mark.parametrize(
    ("weights", "on_cpu"),
    [(135 * 10**6, 8192), (10**9, 8192), (15 * 10**8, 5120), (2 * 10**9, 4096), (8 * 10**9, 2048), (10**12, 2048)],
)
def test_on_a_cpu_large_models_take_fewer_tokens(monkeypatch, weights, on_cpu):
    monkeypatch.setattr(calibration_tokens, "num_weights", lambda _: weights)
    assert default_tokens(None, torch.device("cpu")) == on_cpu
    assert default_tokens(None, torch.device("cuda")) == 8192


def test_too_few_say_nothing():
    check_calibration_tokens(None)
    check_calibration_tokens(64)
    with pytest.raises(RefusedError, match=r"63 is too few .* set 64 or more"):
        check_calibration_tokens(63)
