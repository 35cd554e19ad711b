"""SmolLM2-135M-Instruct as a multi-head model: its three KV heads repeated for its nine query heads.

Small models are published with grouped-query attention; this one computes the same as the original and has multi-head
attention's wide cache, so that the two can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from . import smollm2
from .recipe import Recipe


def _build(sources: Mapping[str, Path], target: Path) -> None:
    from . import checkpoint, repeat_heads  # import torch

    repeat_heads.write(sources[smollm2.RECIPE.name], target)
    checkpoint.read(target).check_continuation("The capital of France is", " Paris")


RECIPE = Recipe(
    name="smollm2-mha",
    folder="smollm2-135m-instruct-mha",
    title="SmolLM2-135M-Instruct with multi-head attention (from the model smollm2, Apache-2.0)",
    wheels=(),
    revision=1,
    build=_build,
    base=smollm2.RECIPE,
)
