"""The cache as the server has it: the same formats, bases and pages, written and read by the reference kernels."""

from collections.abc import Sequence

import torch

from xquant_vllm.attention.latents import read_blocks
from xquant_vllm.attention.reference import store
from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.model.cache_method import InputMethod
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.progress import counted_bar
from xquant_vllm.projection.rematerialize import rematerialize_keys, rematerialize_values
from xquant_vllm.scheme.builder import Factors, LayerParameters, SchemeBuilder
from xquant_vllm.scheme.formats import LayerFormat
from xquant_vllm.scheme.settings import XQuantSettings

_BLOCK_SIZE = 16


class ServedCache(InputMethod):
    """Pages of one sequence, in every layer."""

    keys_are_normed = True

    def __init__(
        self,
        settings: XQuantSettings,
        formats: Sequence[LayerFormat],
        factors: Factors,
        parameters: Sequence[LayerParameters],
    ) -> None:
        """Build all layers.

        Args:
            settings: the settings.
            formats: what they make of the model's layers.
            factors: gives the bases of latents.
            parameters: what the model makes keys and values with, up to norm and RoPE, which stay the model's.
        """
        builder = SchemeBuilder(settings, formats, factors)
        shown = counted_bar(enumerate(parameters), len(parameters), "prepare cache", "layer")
        built = [builder.build(position, layer) for position, layer in shown]
        self._caches = [cache for cache, _ in built]
        self._downs = [down for _, down in built]
        # Scores are the model's own affair.
        self._plans = [
            cache.plan(
                _BLOCK_SIZE,
                [formats[position] for position in cache.format.reads],
                num_heads=cache.format.shape.num_kv_heads,
                scale=1.0,
                sliding_window=None,
                logits_soft_cap=None,
            )
            for cache in self._caches
        ]
        self._pages: list[torch.Tensor] = []

    def start(self, num_tokens: int) -> None:
        """Empty pages, in blocks that follow one another."""
        blocks = -(-num_tokens // _BLOCK_SIZE)
        device = self._caches[0].projection.up_key.device
        self._pages = [
            torch.zeros(blocks, plan.layout.page_bytes, dtype=torch.uint8, device=device) for plan in self._plans
        ]

    def rematerialize(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what the tokens bring, and read all of it back."""
        cache, plan, down = self._caches[layer], self._plans[layer], self._downs[layer]
        num_tokens, head_size = hidden.shape[0], cache.format.shape.head_size
        pages = [self._pages[layer], *(self._pages[position] for position in cache.format.reads)]
        if down is None:
            key = value = hidden.unsqueeze(1)
        else:
            latents = torch.nn.functional.linear(hidden, down.to(hidden.dtype)).unflatten(1, (-1, head_size))
            key, value = latents.chunk(2, 1)
        positions = torch.arange(num_tokens, device=hidden.device)
        store(pages, plan, positions, cache.inputs(key, value))

        blocks = torch.arange(pages[0].shape[0], device=hidden.device)
        key_latents = read_blocks(pages, plan.layouts, plan.key_terms, blocks)[:num_tokens]
        value_latents = key_latents
        if plan.value_terms != plan.key_terms:
            value_latents = read_blocks(pages, plan.layouts, plan.value_terms, blocks)[:num_tokens]
        keys = rematerialize_keys(key_latents, positions, plan.projection)
        values = rematerialize_values(value_latents, plan.projection)
        return keys.flatten(1), values.flatten(1)


def layer_parameters(model: HookedModel, layer: int, dtype: torch.dtype) -> LayerParameters:
    """A layer's weights in the dtype to serve in, and biases.

    No RoPE, and no norm but the one that is over all key heads together: the model applies them itself.

    Raises:
        RefusedError: the server would refuse such a model.
    """
    # As they are stored, not as the model runs: a folder's factors know the weights that they were made from.
    key, value = (weight.to(model.device, dtype) for weight in model.checkpoint.key_value(layer))
    key_bias, value_bias = model.layers[layer].biases
    norm = model.layers[layer].key_norm
    if norm is not None and key_bias is not None:
        raise RefusedError(
            f"xquant: {model.checkpoint.name} normalizes the keys of all heads together after a bias was added, which "
            "latents do not have: not supported"
        )
    return LayerParameters(key, value, key_bias, value_bias, norm)
