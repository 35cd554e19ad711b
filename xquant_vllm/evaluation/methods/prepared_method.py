"""A method for a model, settled except for what needs the model's weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xquant_vllm.evaluation.model.cache_method import CacheMethod
from xquant_vllm.evaluation.model.hooked_model import HookedModel


@dataclass(frozen=True)
class PreparedMethod:
    """What is known before the model is loaded.

    Attributes:
        name: of the method.
        bits: per code: one number, or one for keys and one for values.
        settings: all else that determines what it computes, as JSON.
        bytes_per_token: of all layers, everything counted.
        build: makes it, given the model.
    """

    name: str
    bits: int | dict[str, int]
    settings: dict[str, Any]
    bytes_per_token: float
    build: Callable[[HookedModel], CacheMethod]
