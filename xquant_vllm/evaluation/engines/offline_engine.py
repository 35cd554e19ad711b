"""Logits from the transformers model, which is loaded when the first are asked for."""

from functools import cached_property

import torch

from xquant_vllm.evaluation.methods.prepared_method import PreparedMethod
from xquant_vllm.evaluation.model.cache_method import CacheMethod
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.checkpoint import Checkpoint


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

    def reference(self, tokens: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """With the 16-bit cache; see :class:`xquant_vllm.evaluation.engines.logits.Logits`."""
        return self._model.logits(tokens, CacheMethod(), last)

    def candidate(self, tokens: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """With the method's cache."""
        return self._model.logits(tokens, self._method, last)
