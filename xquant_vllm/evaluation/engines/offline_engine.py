"""Logits from the transformers model, which is loaded when it is told so, or when the first are asked for."""

from functools import cached_property

import torch

from xquant_vllm.evaluation.methods.prepared_method import PreparedMethod
from xquant_vllm.evaluation.model.cache_method import CacheMethod
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.evaluation.model.logits import Rows
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.memory import warn_of_memory
from xquant_vllm.offline.progress import say
from xquant_vllm.projection.factor_file import dtype_name


class OfflineEngine:
    """One model with two caches."""

    def __init__(
        self, checkpoint: Checkpoint, method: PreparedMethod, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Prepare; see :class:`xquant_vllm.evaluation.model.hooked_model.HookedModel`."""
        self._checkpoint, self._prepared, self._dtype, self._device = checkpoint, method, dtype, device

    @cached_property
    def _model(self) -> HookedModel:
        return HookedModel(self._checkpoint, self._dtype, self._device)

    @cached_property
    def _method(self) -> CacheMethod:
        return self._prepared.build(self._model)

    def load(self, name: str | None = None) -> None:
        """Load the model and make the method's cache now, and say so, instead of with the first logits.

        Args:
            name: what to call the model; None for its own name.
        """
        name, dtype = name or self._checkpoint.name, dtype_name(self._dtype)
        instead = "Set --dtype bfloat16, or --device cuda" if dtype == "float32" else "Take a machine with more memory"
        warn_of_memory(self._checkpoint, self._dtype, self._device, "evaluating", instead)
        say(f"loading {name} in {dtype}")
        self._model  # noqa: B018
        self._method  # noqa: B018

    def reference(self, tokens: torch.Tensor, last: int | None = None) -> Rows:
        """With the 16-bit cache; see :class:`xquant_vllm.evaluation.model.logits.Logits`."""
        return self._logits(tokens, CacheMethod(), last)

    def candidate(self, tokens: torch.Tensor, last: int | None = None) -> Rows:
        """With the method's cache."""
        return self._logits(tokens, self._method, last)

    def _logits(self, tokens: torch.Tensor, method: CacheMethod, last: int | None) -> Rows:
        return self._model.rows(tokens, method) if last is None else self._model.logits(tokens, method, last)
