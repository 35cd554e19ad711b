"""What of a model is not supported, as far as its configuration tells, in the words of the server's own refusals.

The server looks at more (plugin/checks.py, and every layer once it is loaded): what is named here is refused there,
what is not may still be.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from xquant_vllm.planning.layer_kinds import LayerKinds


def model_problems(config: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    """Why no cache of this package serves a model.

    Args:
        config: the whole configuration.
        text: that of its text part.
    """
    attends = text.get("attn_config")
    alibi = text.get("alibi") or text.get("position_encoding_type") == "alibi"
    alibi = alibi or (isinstance(attends, Mapping) and attends.get("alibi"))
    architectures = [str(name) for name in config.get("architectures") or ()]
    key_size = text.get("head_dim")
    for present, feature in (
        (text.get("kv_lora_rank"), "multi-head latent attention (MLA), which already caches latents of its own"),
        (config.get("is_encoder_decoder"), "cross attention between an encoder and a decoder"),
        (alibi or "BloomForCausalLM" in architectures, "ALiBi, a bias on the scores"),
        (_attention_free(architectures, text), "state-space or linear attention layers alone, without keys and values"),
        (text.get("num_kv_shared_layers"), "layers that share a cache"),
        (_chunked(text), "attention within chunks of the sequence (attention_chunk_size)"),
        (
            not text.get("kv_lora_rank") and key_size and text.get("v_head_dim") not in (None, key_size),
            "value heads of another size than keys",
        ),
        (text.get("clip_qkv"), "keys and values that are clamped (clip_qkv)"),
    ):
        if present:
            # One is enough: what makes a model special tends to show in several settings.
            return [feature]
    return []


def model_notes(config: Mapping[str, Any], text: Mapping[str, Any], kinds: LayerKinds) -> Iterator[str]:
    """What does not stop a model from being served, and a reader must know."""
    if kinds.with_states:
        yield (
            f"{kinds.with_states} layers keep a state instead of keys and values: states take memory, too, which is "
            "not counted here"
        )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if isinstance(rope, Mapping) and rope.get("mrope_section"):
        yield "positions of images are not cached: serve it with --language-model-only"
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        if quantization.get("kv_cache_scheme") or quantization.get("kv_cache_quant_algo"):
            yield "the checkpoint asks for a cache in a format of its own: add --kv-cache-dtype bfloat16"
        yield "the checkpoint is quantized: it is factorized when it is loaded, and cannot be calibrated"


def _attention_free(architectures: list[str], text: Mapping[str, Any]) -> bool:
    free = ("mamba", "mamba2", "falcon_mamba", "rwkv")
    return text.get("model_type") in free or any(name.startswith(("Mamba", "FalconMamba")) for name in architectures)


def _chunked(text: Mapping[str, Any]) -> bool:
    """As plugin/checks.py tells it; layers without RoPE never attend in chunks."""
    kinds, ropes = text.get("layer_types") or (), text.get("no_rope_layers") or ()
    chunked = any(ropes) if ropes else "chunked_attention" in kinds
    return bool(chunked and text.get("attention_chunk_size"))
