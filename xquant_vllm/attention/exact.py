"""The tokens of a step as the model computed them: what the queries of a prompt may attend to instead of its pages.

A latent is linear, so nothing of the pages is needed: in a chain the terms of earlier layers and the own difference add
up to the own latent, whatever the earlier layers have stored. An exact token is its input in the channels of the own
stream, and zero in those of other terms.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.projection.rematerialize import rematerialize_keys


def own_channels(plan: AttentionLayerPlan, terms: Sequence[LatentTerm]) -> tuple[int, slice]:
    """Which stream of the layer's own pages a latent is read from, and in which of its channels.

    Args:
        plan: the layer's plan.
        terms: its key terms or its value terms.
    """
    begin = end = 0
    for term in terms:
        width = plan.layouts[term.page].streams[term.stream].width
        if not term.adds:
            begin, end = end, end + width
        if not term.page:
            return term.stream, slice(begin, begin + width)
    raise ValueError("a latent is read from no stream of the layer's own pages")


def exact_rows(plan: AttentionLayerPlan, inputs: Sequence[torch.Tensor], terms: Sequence[LatentTerm]) -> torch.Tensor:
    """What the own stream of a latent would hold if nothing were quantized or predicted.

    Args:
        plan: the layer's plan.
        inputs: as of :func:`reference.store`.
        terms: the plan's key terms or its value terms.

    Returns:
        ``[num_tokens, latent heads, width of the stream]``, FP32.
    """
    index, _ = own_channels(plan, terms)
    stream = plan.layout.streams[index]
    rows = inputs[index].flatten(1).float()
    if plan.rotation is not None and index == 0:
        rows = plan.rotation.apply(rows)
    return rows.unflatten(1, (stream.num_heads, stream.width))


def exact_latents(
    plan: AttentionLayerPlan, inputs: Sequence[torch.Tensor], terms: Sequence[LatentTerm], width: int
) -> torch.Tensor:
    """A latent of the tokens of a step, not quantized.

    Args:
        plan: the layer's plan.
        inputs: as of :func:`reference.store`.
        terms: the plan's key terms or its value terms.
        width: channels of the latent; more than the terms have are zero.

    Returns:
        ``[num_tokens, latent heads, width]``, FP32.
    """
    rows = exact_rows(plan, inputs, terms)
    _, channels = own_channels(plan, terms)
    return torch.nn.functional.pad(rows, (channels.start, width - channels.stop))


def exact_keys(plan: AttentionLayerPlan, inputs: Sequence[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Keys of the tokens of a step.

    Args:
        plan: the layer's plan.
        inputs: as of :func:`reference.store`.
        positions: ``[num_tokens]``, the tokens' positions.

    Returns:
        ``[num_tokens, num_kv_heads, head_size]``, FP32, after RoPE.
    """
    _, channels = own_channels(plan, plan.key_terms)
    own = replace(plan.projection, up_key=plan.projection.up_key[:, channels])
    return rematerialize_keys(exact_rows(plan, inputs, plan.key_terms), positions, own)


def query_positions(batch: AttentionBatch, num_tokens: int) -> torch.Tensor:
    """Position of every query token, ``[num_tokens]`` int64; 0 of padding behind the last sequence."""
    starts = batch.query_start_loc.long()
    counts = starts[1:] - starts[:-1]
    positions = torch.zeros(num_tokens, dtype=torch.int64, device=starts.device)
    first = torch.repeat_interleave(batch.seq_lens.long() - counts - starts[:-1], counts)
    positions[: first.shape[0]] = first + torch.arange(first.shape[0], device=starts.device)
    return positions


def prompts(plan: AttentionLayerPlan, batch: AttentionBatch) -> bool:
    """Whether a sequence of a batch attends to its own tokens exactly; asks no device if the host knows."""
    if plan.exact_from is None:
        return False
    longest = batch.max_query_len
    if longest is None:
        starts = batch.query_start_loc
        longest = int((starts[1:] - starts[:-1]).max()) if starts.shape[0] > 1 else 0
    return longest >= plan.exact_from
