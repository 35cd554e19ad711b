"""What writing to the pool needs of a device, in PyTorch: the oracle of the kernels, and the fallback."""

from collections.abc import Sequence

import torch

from xquant_vllm.attention.latents import read_slots
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.pages import load_slots
from xquant_vllm.projection.rematerialize import finish_keys


def read_tokens(
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    slots: torch.Tensor,
    latents: torch.Tensor,
    *,
    values: bool,
    first_term: int,
    output: torch.Tensor | None,
) -> None:
    """Read a latent of single tokens.

    Args:
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8.
        plan: the layer's plan.
        slots: ``[n]`` int64, slots in the pages.
        latents: ``[n, latent heads, width of all terms]`` FP32, contiguous. With ``first_term`` > 0 it has the channels
            of the terms before already. Written.
        values: whether the value latent is read, not the key latent.
        first_term: the first term that is read.
        output: the same in another dtype, written too; or None.
    """
    terms = plan.value_terms if values else plan.key_terms
    if first_term == 0:
        latents.copy_(read_slots(pages, plan.layouts, terms, slots))
    else:
        end = 0
        for index, term in enumerate(terms):
            layout = plan.layouts[term.page]
            width = layout.streams[term.stream].width
            end += 0 if term.adds else width
            if index < first_term:
                continue
            loaded = load_slots(pages[term.page], layout, slots, term.stream)
            channels = latents[:, :, end - width : end]
            channels.copy_(channels + loaded if term.adds else loaded)
    if output is not None:
        output.copy_(latents)


def finish_tokens(plan: AttentionLayerPlan, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Add biases, then norm and turn the keys.

    Args:
        plan: the layer's plan.
        positions: ``[n]`` int64, positions of the tokens.
        keys: ``[n, num_kv_heads, head_size]``, up-projected; heads are contiguous. Changed in place.
        values: likewise.
    """
    projection = plan.projection
    keys.copy_(finish_keys(keys.float(), positions, projection))
    if projection.value_bias is not None:
        values.copy_(values.float() + projection.value_bias)
