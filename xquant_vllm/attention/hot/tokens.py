"""The tokens that a step writes to the pool, and what is carried for them from layer to layer."""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch

from xquant_vllm.attention.hot.policy import HotStep, Ints


@dataclass
class HotTokens:
    """Made anew in every step and shared by the layers of a KV cache group.

    Attributes:
        slots: ``[n]`` int64, slots in the pages.
        positions: ``[n]`` int64, positions of the tokens.
        hot_slots: ``[n]`` int64, slots in the pool.
        carried: latents of these tokens that the last layer has put together, FP32, and which layer that was. The next
            layer of a chain adds its own instead of reading those of all layers before it again. As it lives and dies
            with the step's tokens, nothing of another step can be found here.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    hot_slots: torch.Tensor
    carried: tuple[Hashable, torch.Tensor] | None = None

    @classmethod
    def of(cls, step: HotStep) -> "HotTokens":
        """Those of a step."""
        return cls(_tensor(step.slots), _tensor(step.positions), _tensor(step.hot_slots))

    def take_carried(self, layer: Hashable) -> torch.Tensor | None:
        """The latents that ``layer`` has left, if it was the last one; they belong to the caller then."""
        if self.carried is None or self.carried[0] != layer:
            return None
        latents, self.carried = self.carried[1], None
        return latents

    @property
    def count(self) -> int:
        """How many tokens."""
        return self.slots.shape[0]


def _tensor(numbers: Ints) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, np.int64))
