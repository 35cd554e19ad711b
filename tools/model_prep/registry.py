"""The models that tools/prepare_model.py knows. A new one is a module with a RECIPE and a line here."""

from __future__ import annotations

from . import gemma3, qwen_coder, smollm2, smollm2_full_rank, smollm2_mha
from .recipe import Recipe

MODELS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        smollm2.RECIPE,
        gemma3.RECIPE,
        smollm2_mha.RECIPE,
        smollm2_full_rank.RECIPE,
        qwen_coder.SMALL,
        qwen_coder.LARGE,
    )
}
