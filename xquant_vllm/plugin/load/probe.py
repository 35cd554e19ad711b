"""What attention modules are run on to see what they do."""

from dataclasses import dataclass

import torch

from xquant_vllm.plugin.load.random_input import random_input
from xquant_vllm.plugin.load.recognize import AttentionParts
from xquant_vllm.plugin.load.rope.positions import on_all_axes

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """Inputs of an attention module.

    Attributes:
        hidden: layer inputs ``[num_tokens, hidden_size]``.
        positions: ``[num_tokens]``, places in the sequence.
        given: the same as the module gets them, ``[num_tokens]`` or ``[axes, num_tokens]``.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    given: torch.Tensor


def make_probe(parts: AttentionParts, hidden_size: int, like: torch.Tensor) -> Probe:
    """Random layer inputs at positions over the whole range of the model.

    Args:
        parts: the module that they are for.
        hidden_size: channels.
        like: a tensor of the inputs' dtype on their device.
    """
    hidden = random_input(_PROBE_TOKENS, hidden_size, like.dtype, like.device)
    last = 1024 if parts.rope is None else parts.rope.cos.shape[0] - 1
    positions = torch.linspace(0, last, _PROBE_TOKENS, dtype=torch.float64, device="cpu").long()
    positions = positions.to(like.device)
    return Probe(hidden, positions, on_all_axes(positions, parts.position_axes))
