"""A model as a plan sees it: sizes, kinds of layers, and what of it is not supported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.checkpoint import PROJECTION
from xquant_vllm.planning.layer_kinds import WINDOWED, layer_kinds
from xquant_vllm.planning.model_files import ModelFiles
from xquant_vllm.planning.problems import model_notes, model_problems
from xquant_vllm.projection.factor_file import DTYPES

# What configurations of different families call the same thing.
_HIDDEN = ("hidden_size", "n_embd", "d_model", "hidden_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_HEAD_SIZE = ("head_dim", "kv_channels", "attention_head_dim")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
_TEXT = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class PlannedModel:
    """One model.

    Attributes:
        name: as the user gave it.
        architecture: its first architecture.
        hidden_size: channels of a layer's input.
        heads: query heads.
        kv_heads: kv heads, of all ranks together.
        head_size: channels of a head.
        windows: of every attention layer the tokens that a query sees, or None.
        with_states: layers beside them that keep a state.
        positions: the longest context that the configuration names, None if it names none.
        stored_dtype: of the checkpoint.
        keys_normed_together: whether keys are normalized over all kv heads together.
        mla_width: numbers of a token and layer that multi-head latent attention caches; None for other attention.
        problems: why no cache of this package can serve the model; empty if one can.
        calibratable: whether ``xquant factorize --calibration`` knows its weights.
        notes: what else the reader should know.
        weight_bytes: of all tensors, None without files.
    """

    name: str
    architecture: str
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    windows: tuple[int | None, ...]
    with_states: int
    positions: int | None
    stored_dtype: str
    keys_normed_together: bool
    mla_width: int | None
    problems: tuple[str, ...]
    calibratable: bool
    notes: tuple[str, ...]
    weight_bytes: int | None

    @property
    def layers(self) -> int:
        """Attention layers."""
        return len(self.windows)

    def kv_heads_of_rank(self, ranks: int) -> int:
        """Kv heads on a rank of tensor parallelism; with fewer heads than ranks several keep the same one."""
        return max(1, self.kv_heads // ranks)

    def serving_dtype(self, name: str) -> torch.dtype:
        """The dtype that vLLM serves in; ``auto`` is float16 for float16 checkpoints, else bfloat16."""
        if name == "auto":
            name = "float16" if self.stored_dtype == "float16" else "bfloat16"
        return DTYPES[name]


def planned_model(files: ModelFiles) -> PlannedModel:
    """Read a model's sizes.

    Args:
        files: its configuration and headers.

    Raises:
        RefusedError: the configuration does not name them.
    """
    config = files.config
    text = next((config[name] for name in _TEXT if isinstance(config.get(name), Mapping)), config)
    problems = model_problems(config, text)
    hidden, heads = _number(text, _HIDDEN), _number(text, _HEADS)
    layers = _number(text, _LAYERS)
    if not (hidden and layers and heads):
        missing = _HIDDEN if not hidden else _LAYERS if not layers else _HEADS
        why = f" ({problems[0]})" if problems else ""
        raise RefusedError(
            f"xquant: {files.name} has no {missing[0]} in config.json{why}, without which its cache cannot be planned; "
            "name a decoder-only model with attention"
        )
    kv_heads = _kv_heads(text, heads)
    head_size = _number(text, _HEAD_SIZE) or hidden // heads
    kinds = layer_kinds(files, text, layers)
    mla_width = None
    if text.get("kv_lora_rank"):
        mla_width = int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0)
    notes = list(model_notes(config, text, kinds))
    if files.shapes is None:
        notes.append("there are no safetensors files, so whether keys are normalized over all heads is not known")
    window = _number(text, ("sliding_window",))
    return PlannedModel(
        name=files.name,
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        windows=tuple(window if kind == WINDOWED else None for kind in kinds.attention),
        with_states=kinds.with_states,
        positions=_number(text, _POSITIONS),
        stored_dtype=str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16"),
        keys_normed_together=_normed_together(files.shapes or {}, kv_heads, head_size),
        mla_width=mla_width,
        problems=tuple(problems + _size_problems(head_size)),
        calibratable=_calibratable(files.shapes, config),
        notes=tuple(notes),
        weight_bytes=files.weight_bytes,
    )


def _number(table: Mapping[str, Any], names: Sequence[str]) -> int | None:
    for name in names:
        value = table.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _kv_heads(text: Mapping[str, Any], heads: int) -> int:
    # Falcon and GPT-BigCode say it by a flag.
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    return _number(text, _KV_HEADS) or heads


def _normed_together(shapes: Mapping[str, tuple[int, ...]], kv_heads: int, head_size: int) -> bool:
    """Told from the shape of the norms' weights, as offline/checkpoint.py does."""
    of_norms = [shape for name, shape in shapes.items() if name.endswith(".k_norm.weight")]
    return kv_heads > 1 and any(shape == (kv_heads * head_size,) for shape in of_norms)


def _calibratable(shapes: Mapping[str, Any] | None, config: Mapping[str, Any]) -> bool:
    if config.get("quantization_config"):
        return False
    return shapes is None or any(PROJECTION.fullmatch(name) for name in shapes)


def _size_problems(head_size: int) -> list[str]:
    if head_size % 8:
        return [f"heads of {head_size} channels cannot be packed into whole bytes"]
    return [f"heads of {head_size} channels are more than 256"] if head_size > 256 else []
