"""A model's name: a folder, or a name on the hub, and what is said of neither."""

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.locate import locate_checkpoint


class Response:
    """As much of an answer of the hub as its errors read."""

    headers: dict = {}
    request = None
    status_code = 404


def hub_that(monkeypatch, answer):
    def fetch(name, **_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)


def refusal(model):
    with pytest.raises(RefusedError) as error:
        locate_checkpoint(model)
    (line,) = str(error.value).splitlines()
    assert line.startswith("xquant: ")
    return line


def test_folders_and_names_are_found(tmp_path, monkeypatch):
    assert locate_checkpoint(str(tmp_path)) == locate_checkpoint(tmp_path) == tmp_path
    hub_that(monkeypatch, str(tmp_path))
    assert locate_checkpoint("someone/model-1.5_b") == tmp_path
    assert locate_checkpoint("gpt2") == tmp_path


@pytest.mark.parametrize("model", ["/nope", "./nope", "~/nope", "a/b/c", "models/nope/", "", "C:\\models"])
def test_what_cannot_be_a_name_on_the_hub_is_not_looked_for_there(monkeypatch, model):
    hub_that(monkeypatch, AssertionError("asked"))
    line = refusal(model)
    assert line.startswith(f"xquant: there is no folder {model!r}; name the folder of a checkpoint, or a model on the")
    assert "such as HuggingFaceTB/SmolLM2-135M-Instruct" in line


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    assert refusal(str(file)) == f"xquant: {file} is a file; name the folder of a checkpoint"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RepositoryNotFoundError("404 Client Error\n\nRepository Not Found", response=Response()),
            "the hub has no such model",
        ),
        (GatedRepoError("403", response=Response()), "accept them there and run hf auth login"),
        (LocalEntryNotFoundError("no network"), "the Hugging Face hub cannot be asked for it (no network); look at"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(monkeypatch, error, said):
    hub_that(monkeypatch, error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    line = refusal("models/nope")
    assert "there is no folder 'models/nope' here" in line
    assert said in line
    assert line.endswith(", or name the folder of a checkpoint")


def test_an_offline_hub_is_named(monkeypatch):
    hub_that(monkeypatch, LocalEntryNotFoundError("outgoing traffic has been disabled"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "which HF_HUB_OFFLINE forbids to do now; unset HF_HUB_OFFLINE, or" in refusal("models/nope")
