"""Which settings are calibrated on which models, and what is said where they cannot be."""

import pytest

from xquant_vllm.scheme.calibration.choice import CalibrationChoice, ModelShape, choose_calibration, why_not_calibrated
from xquant_vllm.scheme.settings import parse_settings

GROUPED = ModelShape(hidden_size=576, kv_heads=3, head_size=64)  # SmolLM2
SINGLE = ModelShape(hidden_size=640, kv_heads=1, head_size=256)  # Gemma 3
NARROW = ModelShape(hidden_size=576, kv_heads=9, head_size=64)  # with multi-head attention
TWO_RANKS = ModelShape(576, 3, 64, ranks=2)
CHAIN, JOINT, HEAD = {"method": "xquant-cl"}, {"basis": "joint"}, {"basis": "head"}
FREE = "data-free"


@pytest.mark.parametrize(
    ("settings", "shape", "expected"),
    [
        ({}, GROUPED, FREE),
        ({}, SINGLE, FREE),
        ({}, NARROW, FREE),
        ({"bits": 16}, GROUPED, FREE),
        ({"bits": 8}, GROUPED, FREE),
        ({"bits": 3}, GROUPED, "head"),
        ({"bits": 2}, GROUPED, "head"),
        # A single head has one latent for its keys and values, which loses less than two.
        ({"bits": 3}, SINGLE, "joint"),
        ({"bits": 2}, SINGLE, "joint"),
        ({"bits": 3, **HEAD}, SINGLE, "head"),
        ({"bits": 2, **HEAD}, SINGLE, "head"),
        # Left to the checkpoint, which may have a norm that forbids joint latents.
        ({"bits": 3}, NARROW, None),
        ({"bits": 3, **HEAD}, NARROW, "head"),
        (JOINT, GROUPED, "joint"),
        ({**JOINT, "bits": 8}, GROUPED, FREE),
        (CHAIN, GROUPED, None),
        ({**CHAIN, "bits": 8}, GROUPED, FREE),
        ({"bits": 2}, TWO_RANKS, "head"),
        ({"bits": 2}, ModelShape(640, 1, 256, ranks=2), "head"),
        ({"bits": 3}, ModelShape(640, 1, 256, ranks=2), "head"),
        ({"bits": 2}, ModelShape(576, 9, 64, ranks=2), "head"),
    ],
)
def test_auto_calibrates_what_loses_less(settings, shape, expected):
    choice = choose_calibration(parse_settings(settings), shape)
    assert (FREE if choice is None else choice.basis) == expected
    assert choice is None or choice.text == "mixed-text"
    assert choose_calibration(parse_settings({**settings, "calibration": "none"}), shape) is None
    assert why_not_calibrated(parse_settings(settings), shape) is None or settings == {"bits": 16}


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_text_that_is_named_is_calibrated_on(bits):
    for shape, basis in ((GROUPED, "head"), (SINGLE, "joint"), (NARROW, None)):
        settings = parse_settings({"bits": bits, "calibration": "python-docs"})
        assert choose_calibration(settings, shape) == CalibrationChoice("python-docs", basis)


@pytest.mark.parametrize(
    ("settings", "shape", "named"),
    [
        ({"bits": {"key": 4, "value": 2}}, GROUPED, "'bits' is key 4 / value 2, and one number"),
        ({"bits": 16, "calibration": "python-docs"}, GROUPED, "'bits' is key 16 / value 16, and one number"),
        ({"bits": 2, "skip_layers": [0]}, GROUPED, "'skip_layers' says itself what is stored"),
        ({"bits": 2, "cache": "x"}, NARROW, "'cache' says itself"),
        ({"bits": 2, "first_layers": 2}, GROUPED, "'first_layers' says itself"),
        ({"bits": 2, "rotate": False}, GROUPED, "'rotate' says itself"),
        ({"bits": 2, "outlier_channels": 0}, GROUPED, "'outlier_channels' says itself"),
        (CHAIN, TWO_RANKS, "'method': 'xquant-cl' calibrated latents do not shard over 2"),
        (JOINT, TWO_RANKS, "'basis': 'joint' calibrated latents do not shard over 2"),
        ({"bits": 2, "factor_cache": False}, GROUPED, "'factor_cache': false"),
    ],
)
def test_what_cannot_be_calibrated_is_named(settings, shape, named):
    settings = parse_settings(settings)
    assert choose_calibration(settings, shape) is not None
    assert named in why_not_calibrated(settings, shape)


def test_a_default_that_is_spelled_out_decides_nothing():
    settings = parse_settings({"bits": 2, "rotate": True, "outlier_channels": 1, "skip_layers": [], "first_layers": 0})
    assert why_not_calibrated(settings, GROUPED) is None
