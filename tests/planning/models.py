"""Checkpoints as far as a plan reads them: a configuration, and headers of weights that are not there."""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from xquant_vllm.planning.serving import Serving

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def config_folder(folder: Path, *, tensors: dict[str, tuple[int, ...]] | None = None, **config: Any) -> str:
    """Write a Llama with other settings; a setting that is None is left out."""
    table = {name: value for name, value in {**LLAMA, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(table))
    if tensors is not None:
        write_header(folder / "model.safetensors", tensors)
    return str(folder)


def write_header(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file that ends behind its header."""
    header = {name: {"dtype": "BF16", "shape": [*shape], "data_offsets": [0, 0]} for name, shape in tensors.items()}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def serving(**changes: Any) -> Serving:
    """A gibibyte on a CPU."""
    usual = {"memory": 1 << 30, "context": 2048, "hot": None, "ranks": 1, "device": "cpu", "dtype": torch.bfloat16}
    return Serving(**{**usual, **changes})
