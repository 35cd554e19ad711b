"""Speculative decoding: whose drafts are served, and which model is the one that drafts.

Tokens that are drafted are only proposed: the model that is served checks each of them. Its pages are what they are
without a draft, so a draft cannot make an answer wrong, as long as its own layers have pages of their own.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from xquant_vllm.plugin.engine_factors import factors_of
from xquant_vllm.plugin.registration import BACKEND_NAME

# Methods that propose tokens without a model of their own, so without attention layers that would need a cache.
WITHOUT_DRAFT_LAYERS = ("ngram", "suffix")
# Heads that read the hidden states of the model that they draft for. They are loaded with its configuration.
HEADS = ("eagle", "eagle3")
# What is served beside compressed layers: a draft's own are compressed only if its configuration says so.
SPECULATIVE = (*WITHOUT_DRAFT_LAYERS, "draft_model", *HEADS)


def unsupported_speculation(vllm_config: Any, methods: Sequence[str]) -> Iterator[str]:
    """A line for speculative decoding by another method than these, and for drafts that cannot be compressed."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if speculative.method not in methods:
        yield (
            f"speculative decoding by {speculative.method!r} is not supported, because its layers were not tried "
            f"beside those of this backend; use one of {', '.join(methods)}"
        )
    elif getattr(speculative.attention_backend, "name", None) == BACKEND_NAME:
        yield from _uncompressed(vllm_config, speculative)


def _uncompressed(vllm_config: Any, speculative: Any) -> Iterator[str]:
    """Why the layers of a draft cannot be compressed."""
    instead = 'leave "attention_backend" out of --speculative-config, so that they keep keys and values'
    if speculative.parallel_drafting:
        yield f"the layers of a draft with parallel_drafting cannot be compressed, which was not tried; {instead}"
    folder, header = factors_of(vllm_config)
    if speculative.method in HEADS and header is not None:
        yield (
            f"the layers of a head for {speculative.method!r} cannot be compressed beside a model with factors, which "
            f"{folder} has for its own layers alone; {instead}"
        )


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Whether a model is the one that drafts.

    Args:
        vllm_config: the engine's configuration.
        model_config: the model's.
    """
    return vllm_config.speculative_config is not None and model_config is not vllm_config.model_config
