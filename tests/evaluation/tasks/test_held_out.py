"""What a certificate is measured on: nothing that was calibrated on."""

import pytest
import torch

from tests.factorizing import FakeTokenizer
from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.tasks.held_out import held_out
from xquant_vllm.offline.calibration.calibration_tokens import calibration_sequences
from xquant_vllm.offline.checkpoint import open_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    return open_checkpoint(save_tiny_model(tmp_path / "model", "llama"))


def text_of(tmp_path, words):
    path = tmp_path / "mine.txt"
    path.write_text(" ".join(f"word{number}" for number in range(words)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("tokens", [None, 300, 1000])
def test_what_calibration_has_left_of_the_users_text(checkpoint, tmp_path, tokens):
    text = text_of(tmp_path, 12_000)
    name, windows = held_out(checkpoint, None, text, tokens, CPU)
    assert name.endswith("sequences of mine.txt")
    sequences = calibration_sequences(checkpoint, text, tokens, CPU)
    taken, left = ({tuple(row) for row in rows} for rows in (sequences.taken, sequences.left))
    assert {tuple(row) for row in windows.tolist()} <= left - taken
    assert len(sequences.taken) + len(sequences.left) == len(taken | left)
    assert 4 <= len(windows) <= 8


@pytest.mark.parametrize("calibration", [None, "mixed-text", "python-docs"])
def test_else_the_documentation_that_nothing_is_calibrated_on(checkpoint, calibration):
    name, windows = held_out(checkpoint, None, calibration, None, CPU)
    assert name == "python-docs"
    if calibration == "python-docs":
        taken = {tuple(row) for row in calibration_sequences(checkpoint, calibration, None, CPU).taken}
        assert not taken & {tuple(row) for row in windows.tolist()}


def test_a_short_text_of_the_user_leaves_too_little(checkpoint, tmp_path):
    assert held_out(checkpoint, None, text_of(tmp_path, 2100), None, CPU)[0] == "python-docs"


def test_a_text_that_is_given(checkpoint, tmp_path):
    text = text_of(tmp_path, 2100)
    assert held_out(checkpoint, text, "mixed-text", None, CPU)[0] == "mine.txt"
    with pytest.raises(RefusedError, match=r"--certificate-text \S+ is too short"):
        held_out(checkpoint, text_of(tmp_path, 20), None, None, CPU)
    with pytest.raises(RefusedError, match="--certificate-text /not/there cannot be read"):
        held_out(checkpoint, "/not/there", None, None, CPU)
