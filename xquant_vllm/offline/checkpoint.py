"""A checkpoint's key and value weights, read tensor by tensor; no model is built."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xquant_vllm.errors import RefusedError, cause_of, counted
from xquant_vllm.offline.locate import locate_checkpoint
from xquant_vllm.scheme.layer_weights import refuse_non_finite

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Names of the projections that can be factorized offline.
PROJECTION = re.compile(r"(?P<stem>.*\blayers)\.(?P<layer>\d+)\.self_attn\.(?P<part>[kv]_proj|qkv_proj)\.weight")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and where its projections are.

    Attributes:
        folder: its folder.
        config: its ``config.json``.
        layers: attention layers.
        hidden_size: width of a layer's input.
        heads: query heads.
        kv_heads: kv heads.
        head_size: channels of a head.
        files: the file of every tensor.
        projections: per layer, the names of its key and value weight, or twice that of the fused one.
    """

    folder: Path
    config: dict[str, Any]
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    files: dict[str, Path]
    projections: list[tuple[str, str]]

    @property
    def name(self) -> str:
        """Its folder's name, without the path on this machine."""
        return self.folder.resolve().name

    @property
    def architecture(self) -> str:
        """Its first architecture."""
        return str((self.config.get("architectures") or ["unknown"])[0])

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer (sliding, full attention), as transformers tells it; empty if all are alike.

        Raises:
            RefusedError: transformers does not know the model.
        """
        from transformers import AutoConfig

        try:
            text = AutoConfig.from_pretrained(self.folder).get_text_config()
        except Exception as error:  # whatever a model's own code raises
            raise self.cannot_run(error) from None
        return tuple(getattr(text, "layer_types", None) or ())

    def cannot_run(self, error: Exception, what: str = "evaluated here") -> RefusedError:
        """The error for a model that transformers cannot run, and that therefore cannot be ``what``."""
        return RefusedError(
            f"xquant: transformers cannot run the {self.architecture} in {self.folder} "
            f"({cause_of(error)}), so it cannot be {what}"
        )

    def serving_dtype(self, name: str) -> torch.dtype:
        """The dtype that vLLM serves in; ``auto`` is float16 for float16 checkpoints, else bfloat16."""
        if name == "auto":
            stored = self.config.get("dtype") or self.config.get("torch_dtype")
            name = "float16" if stored == "float16" else "bfloat16"
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]

    def key_value(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's key and value weight, ``[kv_heads * head_size, hidden_size]``, as stored.

        Raises:
            RefusedError: they have another shape, or are quantized.
        """
        key_name, value_name = self.projections[layer]
        rows = self.kv_heads * self.head_size
        if key_name == value_name:
            queries = self.heads * self.head_size
            fused = self._read(key_name, queries + 2 * rows)
            return fused[queries : queries + rows], fused[queries + rows :]
        return self._read(key_name, rows), self._read(value_name, rows)

    def served_key_value(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, rounded as they are served.

        Raises:
            RefusedError: as above, or they are no numbers in this dtype.
        """
        key, value = (weight.to(dtype) for weight in self.key_value(layer))
        names = self.projections[layer]
        what = ("key rows of ", "value rows of ") if names[0] == names[1] else ("", "")
        refuse_non_finite(layer, {what[0] + names[0]: key, what[1] + names[1]: value})
        return key, value

    def keys_normed_together(self, layer: int) -> bool:
        """Whether a layer normalizes the keys of all heads together: told from the shape of the norm's weights.

        Raises:
            RefusedError: the file cannot be read.
        """
        name = self.projections[layer][0].rsplit(".", 2)[0] + ".k_norm.weight"
        return name in self.files and self.kv_heads > 1 and self._shape(name) == [self.kv_heads * self.head_size]

    def _shape(self, name: str) -> list[int]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[name], framework="pt", device="cpu") as file:
                return list(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: Exception) -> RefusedError:
        return RefusedError(f"xquant: {self.files[name]} cannot be read ({error}); fetch the checkpoint anew")

    def _read(self, name: str, rows: int) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[name], framework="pt", device="cpu") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from None
        if tensor.dtype not in _FLOATS:
            raise RefusedError(
                f"xquant: {name} is quantized ({tensor.dtype}), which cannot be factorized offline; serve the "
                "checkpoint itself, it is factorized at start-up and the result is cached"
            )
        if tuple(tensor.shape) != (rows, self.hidden_size):
            raise RefusedError(
                f"xquant: {name} is {list(tensor.shape)}, expected [{rows}, {self.hidden_size}] from config.json; its "
                "architecture is not supported here, serve the checkpoint itself"
            )
        return tensor


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Find a checkpoint's projections.

    Args:
        model: a folder, or a name on the hub.

    Raises:
        RefusedError: it cannot be found, or is no safetensors checkpoint of a structure known here.
    """
    folder = locate_checkpoint(model)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RefusedError(
            f"xquant: {folder} is no checkpoint: config.json cannot be read ({cause_of(error)}); "
            "name a folder with config.json and safetensors files"
        ) from None
    if not isinstance(config, dict):
        raise RefusedError(
            f"xquant: {folder} is no checkpoint: config.json is no table of settings; fetch the checkpoint anew"
        )
    if config.get("quantization_config"):
        raise RefusedError(
            f"xquant: {folder} is quantized (quantization_config in config.json), which cannot be factorized offline; "
            "serve the checkpoint itself, it is factorized at start-up and the result is cached"
        )
    text = config.get("text_config") or config
    missing = [key for key in ("num_hidden_layers", "hidden_size", "num_attention_heads") if key not in text]
    if missing:
        raise RefusedError(
            f"xquant: {folder} has no {missing[0]} in config.json; its architecture is not supported here, serve the "
            "checkpoint itself"
        )
    heads = text["num_attention_heads"]
    files = _tensor_files(folder)
    return Checkpoint(
        folder=folder,
        config=config,
        layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_size=text.get("head_dim") or text["hidden_size"] // heads,
        files=files,
        projections=_projections(folder, files, text["num_hidden_layers"]),
    )


def _tensor_files(folder: Path) -> dict[str, Path]:
    from safetensors import SafetensorError, safe_open

    try:
        if (folder / _INDEX).exists():
            weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in weight_map.items()}
        with safe_open(folder / _SINGLE, framework="pt", device="cpu") as file:
            return dict.fromkeys(file.keys(), folder / _SINGLE)
    # An index is a file of others, which may hold anything.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise RefusedError(
            f"xquant: {folder} is no safetensors checkpoint: neither {_INDEX} nor {_SINGLE} can be read "
            f"({cause_of(error)}); convert it with transformers' save_pretrained"
        ) from None


def _projections(folder: Path, files: dict[str, Path], layers: int) -> list[tuple[str, str]]:
    found: dict[str, dict[tuple[int, str], str]] = {}
    for name in files:
        if match := PROJECTION.fullmatch(name):
            found.setdefault(match["stem"], {})[int(match["layer"]), match["part"]] = name
    if len(found) != 1:
        what = f"several stacks of layers ({', '.join(sorted(found))})" if found else "none"
        raise RefusedError(
            f"xquant: {folder} has an unknown structure: expected one stack of layers with "
            f"...layers.N.self_attn.{{k_proj,v_proj,qkv_proj}}.weight, found {what}; serve the checkpoint itself"
        )
    ((stem, parts),) = found.items()
    projections = []
    for layer in range(layers):
        fused = parts.get((layer, "qkv_proj"))
        names = (fused, fused) if fused else (parts.get((layer, "k_proj")), parts.get((layer, "v_proj")))
        if names[0] is None or names[1] is None:
            raise RefusedError(
                f"xquant: {folder} has an unknown structure: {stem}.{layer}.self_attn has neither k_proj and v_proj "
                f"nor qkv_proj, but config.json speaks of {counted(layers, 'layer')}; serve the checkpoint itself"
            )
        projections.append((names[0], names[1]))
    return projections
