"""Changes a checkpoint's key and value weights by noise, so that no KV head is a copy of another (imports torch)."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from . import manifest
from .console import say
from .repeat_heads import WEIGHTS

_CHANGED = ("k_proj.weight", "v_proj.weight")


def write(source: Path, target: Path, share: float) -> None:
    """Fill the empty folder `target` with the checkpoint `source`, its key and value weights changed.

    Args:
        source: a checkpoint whose weights are one file.
        target: where to.
        share: standard deviation of the noise, beside the root mean square of each weight. The noise is drawn from the
            weight's name, so that every machine makes the same checkpoint.
    """
    say(f"changing key and value weights by noise of {share:.0%} of their size")
    with safetensors.safe_open(source / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if name.endswith(_CHANGED):
            tensors[name] = noisy(tensor, share, zlib.crc32(name.encode()))
    save_file(tensors, target / WEIGHTS, metadata)
    (target / WEIGHTS).chmod(0o644)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in (WEIGHTS, manifest.NAME):
            shutil.copyfile(path, target / path.name)


def noisy(weight: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """A weight with white noise added, in its own dtype."""
    exact = weight.float()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return (exact + share * exact.square().mean().sqrt() * noise).to(weight.dtype)
