"""Sequences in files: a calibration that was killed goes on after the last one, and finds the same."""

import pytest
import torch

from tests.tiny_models import save_tiny_model
from xquant_vllm.offline.calibration import samples
from xquant_vllm.offline.calibration.samples import collect_kept_samples, collect_samples
from xquant_vllm.offline.checkpoint import open_checkpoint

CPU = torch.device("cpu")
BATCH = torch.arange(3 * 40).reshape(3, 40) * 7 % 300 + 3


@pytest.fixture(params=["llama", "olmoe-gqa"])
def checkpoint(request, tmp_path):
    samples._last.clear()
    return open_checkpoint(str(save_tiny_model(tmp_path / "model", request.param)))


def same(one, other):
    assert torch.equal(one.hidden, other.hidden)
    assert torch.equal(one.key_gradient, other.key_gradient)
    assert torch.equal(one.value_gradient, other.value_gradient)
    assert (one.key_factor is None) == (other.key_factor is None)
    assert one.key_factor is None or torch.equal(one.key_factor, other.key_factor)


def test_files_hold_what_memory_would(checkpoint, tmp_path):
    expected = collect_samples(checkpoint, BATCH, CPU)
    found = list(collect_kept_samples(checkpoint, BATCH, CPU, tmp_path / "kept"))
    for one, other in zip(expected, found, strict=True):
        same(one, other)


def test_an_interrupted_run_goes_on(checkpoint, tmp_path, monkeypatch, capsys):
    expected = collect_samples(checkpoint, BATCH, CPU)
    whole, seen = samples._samples, []

    def interrupted(model, sequence, *arguments):
        seen.append(sequence.tolist())
        if len(seen) == 2:
            raise KeyboardInterrupt
        return whole(model, sequence, *arguments)

    monkeypatch.setattr(samples, "_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect_kept_samples(checkpoint, BATCH, CPU, tmp_path / "kept")
    for one, other in zip(expected, collect_kept_samples(checkpoint, BATCH, CPU, tmp_path / "kept"), strict=True):
        same(one, other)
    assert seen == [BATCH[i].tolist() for i in (0, 1, 1, 2)]
    assert "xquant: 1 sequence of 3 taken from" in capsys.readouterr().err
    # Nothing is left to do, so the model is not even loaded.
    monkeypatch.setattr(samples, "_load", None)
    assert len(list(collect_kept_samples(checkpoint, BATCH, CPU, tmp_path / "kept"))) == checkpoint.layers


def test_a_damaged_file_is_made_again(checkpoint, tmp_path):
    list(collect_kept_samples(checkpoint, BATCH, CPU, tmp_path / "kept"))
    path = tmp_path / "kept" / "sequence-1.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:1000])
    list(collect_kept_samples(checkpoint, BATCH, CPU, tmp_path / "kept"))
    assert path.read_bytes() == before
