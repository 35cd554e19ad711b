"""Which layers of a model are compressed, for the log."""

from collections import defaultdict
from collections.abc import Iterable

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index

from xquant_vllm.plugin.registration import BACKEND_NAME


def describe_coverage(model: nn.Module) -> str:
    """Name the layers of a model that are compressed, and those that keep keys and values, by which backend, or states.

    Args:
        model: the model, or the part of it on this rank of a pipeline. ``attention_config.backend_per_kind`` may give
            its kinds of layers to several backends.
    """
    layers: dict[str, list[int]] = defaultdict(list)
    states = 0
    for module in model.modules():
        states += isinstance(module, MambaBase)
        if isinstance(module, Attention):
            layers[module.attn_backend.get_name()].append(extract_layer_index(module.layer_name))
    compressed = ranges(layers.pop(BACKEND_NAME, []))
    text = f"layers {compressed} are compressed"
    kept = [f"layers {ranges(numbers)} keep keys and values ({name})" for name, numbers in sorted(layers.items())]
    if states:
        kept.append(f"{states} state-space or linear layers keep their states as they are")
    if kept:
        return "; ".join([text, *kept] if compressed else kept)
    part = any(isinstance(module, PPMissingLayer) for module in model.modules())
    return f"{text}, which is all{' of this rank' if part else ''}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in their order, runs joined: ``0-4, 6``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
