"""Which layers of a model attend to everything, which within a window, and which keep a state instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xquant_vllm.planning.model_files import ModelFiles

FULL, WINDOWED = "full_attention", "sliding_attention"
# Names of layers in configurations, as far as they attend.
_ATTEND = ("attention", "full_attention", "sliding_attention", "chunked_attention", "global", "local", "hybrid", "*")


@dataclass(frozen=True)
class LayerKinds:
    """Of one model.

    Attributes:
        attention: the kind of every attention layer.
        with_states: layers that keep a state, of those beside attention.
    """

    attention: tuple[str, ...]
    with_states: int


def layer_kinds(files: ModelFiles, text: Mapping[str, Any], layers: int) -> LayerKinds:
    """The kinds of a model's layers.

    Args:
        files: its files, in case transformers must be asked.
        text: the configuration of its text part.
        layers: how many it has.
    """
    names = _named(text)
    if names is None and _windowed(text):
        names = _named(_as_transformers_reads(files))
    if names is None or len(names) < layers:
        kind = WINDOWED if _windowed(text) else FULL
        return LayerKinds((kind,) * layers, 0)
    names = names[:layers]
    attending = [name for name in names if name in _ATTEND]
    windowed = _windowed(text)
    kinds = tuple(WINDOWED if windowed and name in ("sliding_attention", "local") else FULL for name in attending)
    return LayerKinds(kinds, len(names) - len(attending))


def _named(text: Mapping[str, Any]) -> Sequence[str] | None:
    for key in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        value = text.get(key)
        if value and isinstance(value, (list, tuple, str)):
            return [str(name) for name in value]
    return None


def _windowed(text: Mapping[str, Any]) -> bool:
    if text.get("use_sliding_window") is False:
        return False
    window = text.get("sliding_window")
    return isinstance(window, int) and window > 0


def _as_transformers_reads(files: ModelFiles) -> Mapping[str, Any]:
    """What transformers makes of a configuration that does not name its layers: some families alternate."""
    if files.folder is None:
        return {}
    try:
        from transformers import AutoConfig

        text = AutoConfig.from_pretrained(files.folder).get_text_config()
        return {"layer_types": getattr(text, "layer_types", None)}
    except Exception:  # it does not know the model; its own code is not run
        return {}
