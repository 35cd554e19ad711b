"""The multi-head SmolLM2 with key and value weights of full rank: repeated heads, each changed by noise of its own.

Repeated heads have an advantage that real multi-head models lack: keys and values of all heads together have a third of
the layer input's rank. Here nothing is left of it. The model is a little worse than the one that it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from . import smollm2_mha
from .recipe import Recipe

# Of the size of the weights.
NOISE = 0.1


def _build(sources: Mapping[str, Path], target: Path) -> None:
    from . import checkpoint, perturb  # import torch

    perturb.write(sources[smollm2_mha.RECIPE.name], target, NOISE)
    checkpoint.read(target).check_continuation("The capital of France is", " Paris")


RECIPE = Recipe(
    name="smollm2-mha-full-rank",
    folder="smollm2-135m-instruct-mha-full-rank",
    title="SmolLM2-135M-Instruct with multi-head attention of full rank (from the model smollm2-mha, Apache-2.0)",
    wheels=(),
    revision=1,
    build=_build,
    base=smollm2_mha.RECIPE,
)
