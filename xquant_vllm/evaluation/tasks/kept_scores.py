"""Scores of windows (or prompts) kept in a folder, so that an evaluation goes on where it was interrupted.

A file per window, named after what was evaluated and the window's tokens: another number of windows takes those that
are there, and whatever changes a score changes its name. Scores of the 16-bit cache are kept beside, for all methods.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from xquant_vllm.evaluation.files import replace_json
from xquant_vllm.offline.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


class _Dataclass(Protocol):
    """A score: a dataclass of numbers."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def of_16bit(self: "Score") -> "Score":
        """What it says of the 16-bit cache alone."""


Score = TypeVar("Score", bound=_Dataclass)


class KeptScores(Generic[Score]):
    """Scores of one method on one model."""

    def __init__(self, folder: Path, model: Mapping[str, Any], method: Mapping[str, Any], kind: type[Score]) -> None:
        """Name them.

        Args:
            folder: where all scores are kept.
            model: all that determines the 16-bit cache's scores but the tokens.
            method: all that further determines the method's; ``name`` is in it.
            kind: class of the scores.
        """
        self._kind = kind
        self._reference = folder / f"16bit-{_digest(model)}"
        is_reference = method["name"] == "16bit"
        self._folder = self._reference if is_reference else folder / f"{method['name']}-{_digest([model, method])}"

    def load(self, tokens: torch.Tensor) -> Score | None:
        """The score of a window ``[num_tokens]``, or None."""
        path = self._folder / _name(tokens)
        try:
            return self._kind(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            logger.warning("xquant: %s is evaluated anew, because it cannot be read (%s)", path, error)
            return None

    def save(self, tokens: torch.Tensor, score: Score) -> None:
        """Keep the score of a window, and with it that of the 16-bit cache."""
        # That one first: where there is a score, there are both.
        if self._folder != self._reference:
            replace_json(self._reference / _name(tokens), dataclasses.asdict(score.of_16bit()))
        replace_json(self._folder / _name(tokens), dataclasses.asdict(score))


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's configuration and weight files."""
    digest = hashlib.sha256()
    for path in sorted({checkpoint.folder / "config.json", *checkpoint.files.values()}):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def _name(tokens: torch.Tensor) -> str:
    return f"window-{hashlib.sha256(tokens.to(torch.int64).numpy().tobytes()).hexdigest()[:32]}.json"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
