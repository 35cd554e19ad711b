"""Checkpoints for the tests of features, made of tiny ones: other weights and adapters."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 4
ALPHA = 8


def with_other_weights(folder: Path, target: Path, only: str = "") -> Path:
    """A checkpoint of the same model whose tensors have their elements in another order.

    Args:
        folder: the checkpoint.
        target: where to write.
        only: part of the names of the tensors that are changed.
    """
    shutil.copytree(folder, target)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view(weight.shape)
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    kept = {name: weight for name, weight in load_file(folder / "model.safetensors").items() if only not in name}
    save_file({**weights, **kept}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def save_adapter(folder: Path, checkpoint: Path, modules: tuple[str, ...], *, rows: slice = slice(None)) -> Path:
    """Write an adapter of a checkpoint, in the form of PEFT.

    Args:
        folder: where to write.
        checkpoint: what it is for.
        modules: last parts of the names of the projections that it changes, in every layer.
        rows: output rows that it changes.
    """
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(modules):
            down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = torch.zeros(weight.shape[0], RANK)
            up[rows] = torch.randn(weight.shape[0], RANK, generator=generator)[rows] * 0.1
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
    assert tensors
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": list(modules),
        "base_model_name_or_path": str(checkpoint),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def merge(checkpoint: Path, adapter: Path, target: Path) -> Path:
    """The checkpoint with an adapter merged into its weights."""
    shutil.copytree(checkpoint, target)
    weights, deltas = load_file(checkpoint / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, up in deltas.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        if module != name.removeprefix("base_model.model."):
            down = deltas[name.replace("lora_B", "lora_A")]
            weights[f"{module}.weight"] += up @ down * (ALPHA / RANK)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target
