"""How a model is to be served: what a plan is asked."""

from dataclasses import dataclass
from typing import Literal

import torch

from xquant_vllm.planning.page_groups import Sequences

Device = Literal["cpu", "cuda"]


# What vLLM takes where a user says nothing: tokens of a block, and batches under way at once, by platform.
_BLOCK_SIZE: dict[Device, int] = {"cpu": 128, "cuda": 16}
_BATCHES: dict[Device, int] = {"cpu": 1, "cuda": 2}
# What vLLM's CPU_ATTN takes, which attends to what is hot on CPUs.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# Of `vllm serve` on CPUs (times the ranks) and on GPUs of less than 70 GiB.
DEFAULT_BATCHED_TOKENS = 2048


@dataclass(frozen=True)
class Serving:
    """What a rank is given.

    Attributes:
        memory: bytes for the cache.
        context: ``--max-model-len``.
        hot: setting ``"hot"``, None for its default.
        ranks: of tensor parallelism.
        device: where it is served.
        dtype: of the model.
        batched_tokens: ``--max-num-batched-tokens``; None: vLLM's default.
    """

    memory: int
    context: int
    hot: int | float | None
    ranks: int
    device: Device
    dtype: torch.dtype
    batched_tokens: int | None = None

    @property
    def block_size(self) -> int:
        """Tokens of a block, unless a backend chooses them."""
        return _BLOCK_SIZE[self.device]

    @property
    def sequences(self) -> Sequences:
        """What vLLM assumes of sequences."""
        times = self.ranks if self.device == "cpu" else 1
        batched = self.batched_tokens or DEFAULT_BATCHED_TOKENS * times
        return Sequences(self.context, _BATCHES[self.device] * batched)


def this_device() -> Device:
    """Where a server on this machine would compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"
