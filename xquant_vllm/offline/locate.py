"""The folder of a model that is named on the command line: a path, or a name on the Hugging Face hub."""

import re
from pathlib import Path

from xquant_vllm.errors import RefusedError, cause_of

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def locate_checkpoint(model: str | Path) -> Path:
    """A model's folder; one on the hub is fetched into the hub's cache.

    Args:
        model: a folder, or a name on the hub.

    Raises:
        RefusedError: there is no such folder, nor a model of that name that can be fetched.
    """
    path, name = Path(model), str(model)
    # Path("") would be the current folder.
    if name and path.is_dir():
        return path
    hub_name(model)
    return _fetched(name)


def hub_name(model: str | Path) -> None:
    """Refuse what is no folder and cannot be a name on the hub.

    Args:
        model: as the user gave it; no folder.

    Raises:
        RefusedError: it cannot be one.
    """
    name = str(model)
    if name and Path(model).exists():
        raise RefusedError(f"xquant: {name} is a file; name the folder of a checkpoint")
    if isinstance(model, Path) or not _HUB_NAME.fullmatch(name):
        raise RefusedError(
            f"xquant: there is no folder {name!r}; name the folder of a checkpoint, or a model on the Hugging Face hub "
            f"such as {_HUB_EXAMPLE}"
        )


def _fetched(name: str) -> Path:
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the hub has many errors of its own
        raise hub_refusal(name, error) from None


def hub_refusal(name: str, error: Exception) -> RefusedError:
    """The error for a model that could not be had from the hub.

    Args:
        name: of the model.
        error: what huggingface_hub raised, or Python because there is none.
    """
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        return RefusedError(
            f"xquant: there is no folder {name!r} here, and to fetch a model from the hub needs huggingface_hub: pip "
            "install huggingface_hub, or name a folder"
        )
    if isinstance(error, errors.GatedRepoError):
        why = "the hub gives it only to those who accepted its terms"
        instead = "accept them there and run hf auth login"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = "the hub has no such model, or keeps it private"
        instead = f"correct the name (they look like {_HUB_EXAMPLE}), run hf auth login if it is private"
    elif constants.HF_HUB_OFFLINE:
        why = "it was not fetched from the hub before, which HF_HUB_OFFLINE forbids to do now"
        instead = "unset HF_HUB_OFFLINE"
    else:
        why = f"the Hugging Face hub cannot be asked for it ({cause_of(error.__cause__ or error)})"
        instead = f"look at the network and at the name (they look like {_HUB_EXAMPLE})"
    return RefusedError(
        f"xquant: there is no folder {name!r} here, and {why}; {instead}, or name the folder of a checkpoint"
    )
