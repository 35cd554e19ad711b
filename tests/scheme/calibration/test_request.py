"""The folder of kept factors has a name that says all that decides what is in it."""

import dataclasses
import shutil

import pytest

from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import RefusedError
from xquant_vllm.scheme.calibration.request import CalibrationRequest, checkpoint_digest, is_kept, is_whole


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model", "llama")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def request_of(model):
    return CalibrationRequest(str(model), "mixed-text", 2, "xquant", "head", "bfloat16")


def test_the_same_request_has_the_same_folder_wherever_the_model_lies(request_of, tmp_path):
    copy = shutil.copytree(request_of.model, tmp_path / "copy")
    folder = request_of.folder()
    assert folder == dataclasses.replace(request_of, model=str(copy)).folder()
    assert is_kept(folder)
    assert not is_kept(copy)
    assert not is_whole(folder)


@pytest.mark.parametrize(
    "change",
    [{"bits": 3}, {"method": "xquant-cl"}, {"basis": "joint"}, {"dtype": "float16"}, {"text": "python-docs"}],
)
def test_another_request_has_another_folder(request_of, change):
    assert dataclasses.replace(request_of, **change).folder() != request_of.folder()


def test_what_a_text_says_counts_and_not_its_name(request_of, tmp_path):
    for name, text in (("one", "a text"), ("same", "a text"), ("other", "another text")):
        (tmp_path / name).write_text(text)
    one, same, other = (
        dataclasses.replace(request_of, text=str(tmp_path / name)).folder() for name in ("one", "same", "other")
    )
    assert one == same != other


def test_any_tensor_that_changes_changes_the_digest(model, tmp_path):
    from safetensors.torch import load_file, save_file

    before = checkpoint_digest(model)
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        copy = shutil.copytree(model, tmp_path / "copy")
        save_file({**tensors, name: tensors[name] * 1.01}, copy / "model.safetensors", {"format": "pt"})
        assert checkpoint_digest(copy) != before, name
        shutil.rmtree(copy)


def test_shards_may_be_cut_anywhere(model, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors, copy = load_file(model / "model.safetensors"), shutil.copytree(model, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, copy / f"shard{number}.safetensors", {"format": "pt"})
    assert checkpoint_digest(copy) == checkpoint_digest(model)


def test_what_is_no_checkpoint_is_refused(request_of, tmp_path):
    with pytest.raises(RefusedError, match="has no safetensors files"):
        dataclasses.replace(request_of, model=str(tmp_path)).folder()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RefusedError, match="cannot be read"):
        dataclasses.replace(request_of, model=str(tmp_path)).folder()


def test_a_text_that_is_not_there_is_named(request_of):
    with pytest.raises(RefusedError, match=r"^the file cannot be read \(No such file or directory\); name a"):
        dataclasses.replace(request_of, text="/no/text").folder()


def test_without_a_home_nothing_is_kept(request_of, monkeypatch):
    monkeypatch.setattr("xquant_vllm.scheme.calibration.request.cache_folder", lambda: None)
    assert request_of.folder() is None
