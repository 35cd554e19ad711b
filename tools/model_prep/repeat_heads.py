"""Rewrites a grouped-query checkpoint as a multi-head one that computes the same (imports torch).

Query head h of a grouped-query layer attends through KV head h // group. Giving every query head a copy of that KV head
of its own changes nothing but the size of the cache, and makes a real multi-head model of any grouped-query one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from . import manifest
from .console import say
from .recipe import PrepareError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_REPEATED = ("k_proj", "v_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "qkv", "kv_proj")
_PER_HEAD_NORMS = ("k_norm", "k_layernorm", "v_norm")
# Other forms of the weights would still have the old heads.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


@dataclass(frozen=True)
class Heads:
    """A checkpoint's attention heads; query heads j * group to (j + 1) * group - 1 share KV head j."""

    query: int
    kv: int
    size: int

    @property
    def group(self) -> int:
        """How many query heads share a KV head."""
        return self.query // self.kv

    def repeat(self, tensor: torch.Tensor) -> torch.Tensor:
        """Each KV head's rows, copied for each query head that attends through it.

        Args:
            tensor: [kv * size, hidden] of a weight, or [kv * size] of a bias.

        Returns:
            [query * size, hidden] or [query * size], in the same dtype.
        """
        return tensor.unflatten(0, (self.kv, self.size)).repeat_interleave(self.group, dim=0).flatten(0, 1).contiguous()


def repeat_kv_heads(source: Path, target: Path) -> None:
    """Write the multi-head form of the checkpoint `source` as a new folder `target`: whole or not at all."""
    if target.exists() or target.is_symlink():
        raise PrepareError(f"{target} exists; name a new folder")
    if not target.parent.is_dir():
        raise PrepareError(f"{target.parent}, in which {target.name} is to be, is no folder")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        partial = Path(beside) / target.name
        partial.mkdir()
        write(source, partial)
        partial.rename(target)


def write(source: Path, target: Path) -> None:
    """Fill the empty folder `target` with the multi-head form of the checkpoint `source`, a shard at a time."""
    config = _json(source / CONFIG)
    index = _json(source / INDEX) if (source / INDEX).is_file() else None
    shards = sorted(set(index.get("weight_map", {}).values())) if index else [WEIGHTS]
    try:
        heads = _heads(config)
        _check_tensors(_shapes(source, shards), heads)
    except PrepareError as error:
        raise PrepareError(f"{source} cannot be rewritten: {error}") from None
    say(f"repeating each of {heads.kv} KV heads {heads.group} times")
    size = parameters = 0
    for shard in shards:
        for tensor in _write_shard(source / shard, target / shard, heads):
            size += tensor.nbytes
            parameters += tensor.numel()
    if index is not None:
        told = {"total_size": size, "total_parameters": parameters}
        index["metadata"] = {name: told.get(name, value) for name, value in index.get("metadata", {}).items()}
        _write_json(target / INDEX, index)
    _write_json(target / CONFIG, {**config, "num_key_value_heads": heads.query})
    _copy_others(source, target, written={CONFIG, INDEX, manifest.NAME, *shards})


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PrepareError(f"{path.parent} is no Hugging Face checkpoint: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise PrepareError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict):
        raise PrepareError(f"{path} holds no JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _heads(config: Mapping[str, Any]) -> Heads:
    """The heads that config.json tells of, if they can be repeated."""
    if "quantization_config" in config:
        raise PrepareError("its weights are quantized; start from the checkpoint that is not")
    query, kv = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not isinstance(query, int) or not isinstance(kv, int):
        raise PrepareError(
            f"its {CONFIG} has num_attention_heads = {query!r} and num_key_value_heads = {kv!r} where two numbers are "
            "needed: it is no plain grouped-query model"
        )
    if kv == query:
        raise PrepareError(f"it is a multi-head model already: {query} query and {kv} KV heads")
    if kv < 1 or query % kv:
        raise PrepareError(f"its {CONFIG} has {query} query heads, which is no multiple of {kv} KV heads")
    size = config.get("head_dim")
    if size is None and isinstance(config.get("hidden_size"), int):
        size = config["hidden_size"] // query
    if not isinstance(size, int):
        raise PrepareError(f"its {CONFIG} has neither head_dim nor hidden_size")
    return Heads(query, kv, size)


def _shapes(source: Path, shards: Iterable[str]) -> dict[str, list[int]]:
    """Every tensor's shape, from the headers alone."""
    shapes = {}
    for shard in shards:
        if not (source / shard).is_file():
            raise PrepareError(f"it has no {shard}, and safetensors only can be read")
        try:
            with safetensors.safe_open(source / shard, framework="pt") as file:
                shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise PrepareError(f"{shard} cannot be read ({type(error).__name__}: {error})") from None
    return shapes


def _check_tensors(shapes: Mapping[str, list[int]], heads: Heads) -> None:
    """Refuse, before anything is written, tensors that repeating rows of k_proj and v_proj would not do right."""
    projections: dict[str, set[str]] = {name: set() for name in _REPEATED}
    for name, shape in shapes.items():
        *path, kind = name.split(".")
        module = path[-1] if path else ""
        if module in _FUSED:
            raise PrepareError(f"{name} holds several projections in one; only separate k_proj and v_proj can be done")
        if module in _PER_HEAD_NORMS and shape != [heads.size]:
            raise PrepareError(f"{name} has the shape {shape}; only [{heads.size}], shared by the heads, can be done")
        if not set(path) & set(_REPEATED):
            continue
        if module not in _REPEATED or kind not in ("weight", "bias"):
            raise PrepareError(f"{name} is neither a weight nor a bias; plain projections only can be done")
        if shape[0] != heads.kv * heads.size:
            raise PrepareError(
                f"{name} has {shape[0]} rows where {CONFIG} tells of {heads.kv} KV heads of {heads.size}"
            )
        if kind == "weight":
            projections[module].add(".".join(path[:-1]))
    keys, values = (projections[name] for name in _REPEATED)
    if not keys:
        raise PrepareError(f"it has no tensor {_REPEATED[0]}.weight: it is not built like Llama")
    if keys != values:
        raise PrepareError(f"{min(keys ^ values)} has only one of {' and '.join(_REPEATED)}")


def _write_shard(source: Path, target: Path, heads: Heads) -> list[torch.Tensor]:
    """Write one file of weights; what it holds is returned."""
    with safetensors.safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if not set(_REPEATED).isdisjoint(name.split(".")):
            tensors[name] = heads.repeat(tensor)
    say(f"writing {target.name}")
    save_file(tensors, target, metadata)
    target.chmod(0o644)  # weights are written for their owner only
    return list(tensors.values())


def _copy_others(source: Path, target: Path, written: set[str]) -> None:
    """Copy the tokenizer and whatever else lies there, but no other form of the weights and no folders."""
    for path in sorted(source.iterdir()):
        if path.name in written:
            continue
        if not path.is_file() or path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json"):
            say(f"leaving out {path.name}")
            continue
        shutil.copyfile(path, target / path.name)
