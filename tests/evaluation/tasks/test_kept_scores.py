"""Scores on disk: whole or not at all, and taken only for what they are of."""

import json

import pytest
import torch

from tests.tiny_models import save_tiny_model
from xquant_vllm.evaluation.files import replace_json
from xquant_vllm.evaluation.tasks.kept_scores import KeptScores, model_fingerprint
from xquant_vllm.evaluation.tasks.scores import WindowScore
from xquant_vllm.offline.checkpoint import open_checkpoint

TOKENS = torch.arange(100)
SCORE = WindowScore(99, 300.5, 290.25, 4.125, 90)
MODEL, METHOD = {"model": "abc", "dtype": "float32"}, {"name": "kivi", "bits": 4, "settings": {"group_size": 32}}


def test_a_score_comes_back_for_the_same_window_method_and_model_only(tmp_path):
    kept = KeptScores(tmp_path, MODEL, METHOD, WindowScore)
    assert kept.load(TOKENS) is None
    kept.save(TOKENS, SCORE)
    assert KeptScores(tmp_path, dict(MODEL), dict(METHOD), WindowScore).load(TOKENS) == SCORE
    assert kept.load(TOKENS + 1) is None
    for model, method in (
        (MODEL | {"dtype": "bfloat16"}, METHOD),
        (MODEL | {"model": "abd"}, METHOD),
        (MODEL, METHOD | {"bits": 3}),
        (MODEL, METHOD | {"settings": {"group_size": 64}}),
    ):
        assert KeptScores(tmp_path, model, method, WindowScore).load(TOKENS) is None


def test_the_16_bit_cache_needs_no_run_of_its_own_afterwards(tmp_path):
    KeptScores(tmp_path, MODEL, METHOD, WindowScore).save(TOKENS, SCORE)
    exact = KeptScores(tmp_path, MODEL, {"name": "16bit", "bits": 16, "settings": {}}, WindowScore).load(TOKENS)
    assert exact == WindowScore(99, 290.25, 290.25, 0.0, 99)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"nll": 1}'])
def test_a_damaged_score_is_evaluated_anew(tmp_path, content, caplog):
    kept = KeptScores(tmp_path, MODEL, METHOD, WindowScore)
    kept.save(TOKENS, SCORE)
    (path,) = tmp_path.glob("kivi-*/window-*.json")
    path.write_text(content)
    assert kept.load(TOKENS) is None
    assert "is evaluated anew" in caplog.text


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "deeper" / "result.json"
    replace_json(path, {"a": 1})
    with pytest.raises(TypeError):
        replace_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
    replace_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}


def test_a_model_is_told_by_its_weights(tmp_path):
    folder = save_tiny_model(tmp_path, "llama")
    before = model_fingerprint(open_checkpoint(str(folder)))
    assert model_fingerprint(open_checkpoint(str(folder))) == before
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_fingerprint(open_checkpoint(str(folder))) != before
