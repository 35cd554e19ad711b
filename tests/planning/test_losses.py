"""What a cache is expected to lose: the shipped file is made from the results, and the nearest model is sensible."""

import json

import pytest

from benchmarks.accuracy.losses import LOSSES, RESULTS, ROWS, SHAPES, text
from tests.planning.models import config_folder, serving
from xquant_vllm.planning.caches import Kind, kinds, pages
from xquant_vllm.planning.losses import nearest_losses
from xquant_vllm.planning.model_files import read_model
from xquant_vllm.planning.planned_model import planned_model


def test_the_package_ships_what_was_measured():
    assert LOSSES.read_text() == text(), "run benchmarks/accuracy/losses.py"


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_planned_bytes_are_those_of_the_accuracy_results(tmp_path, name):
    """Calibrated ones too, of which only a real calibration knows which channel has how many bits."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    hidden, heads, kv_heads, head_size, layers = SHAPES[name]
    model = planned_model(
        read_model(
            config_folder(
                tmp_path,
                hidden_size=hidden,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=head_size,
                num_hidden_layers=layers,
            )
        )
    )
    rows = {row["name"]: row for row in result["rows"]}
    narrow = hidden < 2 * kv_heads * head_size
    compared = 0
    assert pages(Kind("16bit", 16), model, serving()).bytes_per_token == result["rows"][0]["bytes_per_token_16bit"]
    for pattern, (method, calibrated) in ROWS.items():
        for bits in (8, 4, 3, 2):
            row = rows.get(pattern.format(bits))
            if row is None or method == "kivi":  # whose evaluation counts the residual of one window
                continue
            method = "x" if narrow and (method, calibrated) == ("xquant", False) else method
            made = pages(Kind(method, bits, calibrated), model, serving())
            assert made.bytes_per_token == pytest.approx(row["bytes_per_token"], rel=0.001), (pattern, bits)
            compared += 1
    assert compared >= 9


@pytest.mark.parametrize(
    ("sizes", "expected", "alike"),
    [
        ({"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}, "smollm2-135m-instruct", False),
        (
            {
                "hidden_size": 576,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "num_hidden_layers": 30,
            },
            "smollm2-135m-instruct",
            True,
        ),
        (
            {"num_key_value_heads": 32, "num_attention_heads": 32, "hidden_size": 4096},
            "smollm2-135m-instruct-mha",
            False,
        ),
        ({"num_key_value_heads": 8, "num_attention_heads": 32, "hidden_size": 4096}, "smollm2-135m-instruct", False),
        (
            {"num_key_value_heads": 1, "num_attention_heads": 8, "head_dim": 256, "hidden_size": 2048},
            "gemma-3-270m",
            False,
        ),
    ],
)
def test_the_nearest_model(tmp_path, sizes, expected, alike):
    losses = nearest_losses(planned_model(read_model(config_folder(tmp_path, **sizes))))
    assert (losses.model, losses.alike) == (expected, alike)
    assert losses.of(Kind("16bit", 16)).increase == 0


def test_kinds_of_losses_are_kinds_of_plans(tmp_path):
    """A renamed method would silently have no loss."""
    for sizes in ({"num_key_value_heads": 2}, {"num_key_value_heads": 4}):
        model = planned_model(read_model(config_folder(tmp_path, **sizes)))
        assert {*nearest_losses(model).rows} <= {*kinds(model)}
