"""Logits that several caches are compared with, computed once."""

from collections.abc import Callable

import torch

from xquant_vllm.evaluation.model.logits import Rows


class HeldRows:
    """What a model says of tokens, for as long as this lives."""

    def __init__(self) -> None:
        self._held: dict[tuple[bytes, int | None], Rows] = {}

    def of(self, tokens: torch.Tensor, last: int | None, compute: Callable[[], Rows]) -> Rows:
        """The rows of ``tokens``, of the ``last`` of them or of all, computed the first time."""
        key = (tokens.numpy().tobytes(), last)
        if key not in self._held:
            self._held[key] = compute()
        return self._held[key]
