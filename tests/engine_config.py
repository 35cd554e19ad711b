"""A vLLM configuration as far as settings and factors ask one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class EngineConfig(SimpleNamespace):
    """Can be weakly referenced, as vLLM's can."""


def engine_config(
    folder: Path,
    *,
    layers: int,
    kv_heads: int,
    head_size: int,
    ranks: int = 1,
    stages: int = 1,
    dtype: torch.dtype,
    settings: Any,
) -> EngineConfig:
    """The configuration of a model folder that is served with ``settings``, on ranks of a tensor and of a pipeline."""
    model = SimpleNamespace(
        model=str(folder),
        dtype=dtype,
        get_total_num_hidden_layers=lambda: layers,
        get_total_num_kv_heads=lambda: kv_heads,
        get_head_size=lambda: head_size,
    )
    return EngineConfig(
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=stages),
        additional_config={"xquant": settings},
    )
