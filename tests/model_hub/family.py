"""What is known of a family of models, and its tiny checkpoint."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny_models import COMMON, save_random_weights

Shape = dict[str, Any]
FOLLOWS = object()
"""In a shape: not said, since it follows from the rest."""


@dataclass(frozen=True)
class HubFamily:
    """Models that share an architecture.

    Attributes:
        name: the row's first cell, and the name of the family in ``covers`` marks of tests.
        models: names on the model hub, the best known ones.
        architecture: in the models' config.json, by which vLLM chooses its class.
        config: transformers' configuration class.
        shape: settings of it, over ``COMMON`` of tests/tiny_models.py; of a model with images for its text part too.
        made_as: transformers' class that makes the weights, if it is not called as the architecture.
        edit: changes the checkpoint's folder after that: names of weights that transformers does not know.
        engine: more arguments of the engine.
        has_weights: without, only the configuration is written: it is refused before weights are read.
        quick: small and unlike others, so that every run of the tests builds it.
    """

    name: str
    models: tuple[str, ...]
    architecture: str
    config: str
    shape: Shape = field(default_factory=dict)
    made_as: str = ""
    edit: Callable[[Path], None] | None = None
    engine: Shape = field(default_factory=dict)
    has_weights: bool = True
    quick: bool = False


def save(family: HubFamily, folder: Path) -> torch.nn.Module | None:
    """Write the checkpoint of a family; returns transformers' model of it, if that has the same weights."""
    shape = family.shape if "text_config" in family.shape else {**COMMON, **family.shape}
    # Some settings follow from others, and must not be said twice.
    config = getattr(transformers, family.config)(**{name: of for name, of in shape.items() if of is not FOLLOWS})
    model = None
    if family.has_weights:
        torch.manual_seed(0)
        model = getattr(transformers, family.made_as or family.architecture)(config)
        save_random_weights(folder, model)
    else:
        config.save_pretrained(folder)
    change_config(folder, architectures=[family.architecture])
    if family.edit is not None:
        family.edit(folder)
        return None
    return model


def change_config(folder: Path, **changes: Any) -> None:
    """Write settings into a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
