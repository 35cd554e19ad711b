"""Keys and values of single tokens, read from pages as the model would have cached them.

The products are made in the model's dtype, as those of the model itself are, by whatever matrix product PyTorch has for
the device. What is read from pages and what follows the product (bias, norm, RoPE) is computed in FP32, by the
functions of :class:`TokenKernels`: C++ on CPUs, else the reference.

A layer of a chain reads its own pages only. What the layers before it have stored of the same tokens is carried along
in :class:`HotTokens`, so that the cost of a step is linear in the number of layers.
"""

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch

from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.attention.plan import AttentionLayerPlan


class TokenKernels(Protocol):
    """What depends on the device; see :mod:`xquant_vllm.attention.hot.reference`."""

    def read_tokens(
        self,
        pages: Sequence[torch.Tensor],
        plan: AttentionLayerPlan,
        slots: torch.Tensor,
        latents: torch.Tensor,
        *,
        values: bool,
        first_term: int,
        output: torch.Tensor | None,
    ) -> None:
        """Add the terms of a latent from ``first_term`` on to what ``latents`` has of those before."""

    def finish_tokens(
        self, plan: AttentionLayerPlan, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """What follows the product, in place."""


def rematerialize(
    kernels: TokenKernels,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    tokens: HotTokens,
    dtype: torch.dtype,
    layer: Hashable = None,
    before: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a step's tokens.

    Args:
        kernels: see :class:`TokenKernels`.
        pages: for every layout of the plan ``[num_blocks, page_bytes]`` uint8; they hold the tokens.
        plan: the layer's plan.
        tokens: the tokens; what they carry is taken and replaced.
        dtype: of the products and of the result.
        layer: under what name the layer's latents are carried on; None: they are not.
        before: under what name the layer before in a chain has left its latents, or None.

    Returns:
        Keys after bias, norm and RoPE, and values, or value latents where these are the values, both
        ``[n, num_kv_heads, head_size]`` in ``dtype``; heads are contiguous.
    """
    ups = up_projections(plan, dtype)
    projection = plan.projection
    shape = (tokens.count, 2, projection.num_kv_heads, projection.head_size)
    both = torch.empty(shape, dtype=dtype, device=tokens.slots.device)
    keys, values = both.unbind(1)
    if plan.value_terms == plan.key_terms:
        latents, rounded = _chained(kernels, pages, plan, tokens, dtype, before)
        if layer is not None:
            tokens.carried = (layer, latents)
        if ups.both is not None:
            torch.mm(rounded.squeeze(1), ups.both, out=both.flatten(1))
        else:
            _multiply(rounded, ups.key, keys)
            _multiply(rounded, ups.value, values)
    else:
        for of_values, up, heads in ((False, ups.key, keys), (True, ups.value, values)):
            terms = plan.value_terms if of_values else plan.key_terms
            latents = _empty(plan, tokens, terms)
            rounded = torch.empty_like(latents, dtype=dtype)
            kernels.read_tokens(pages, plan, tokens.slots, latents, values=of_values, first_term=0, output=rounded)
            _multiply(rounded, up, heads)
    kernels.finish_tokens(plan, tokens.positions, keys, values)
    return keys, values


def _chained(
    kernels: TokenKernels,
    pages: Sequence[torch.Tensor],
    plan: AttentionLayerPlan,
    tokens: HotTokens,
    dtype: torch.dtype,
    before: Hashable,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A latent that keys and values share, in FP32 and in ``dtype``."""
    latents, first = started_latents(plan, tokens, before)
    rounded = latents if dtype == torch.float32 else torch.empty_like(latents, dtype=dtype)
    output = None if rounded is latents else rounded
    kernels.read_tokens(pages, plan, tokens.slots, latents, values=False, first_term=first, output=output)
    return latents, rounded


def started_latents(plan: AttentionLayerPlan, tokens: HotTokens, before: Hashable) -> tuple[torch.Tensor, int]:
    """Room for a latent that keys and values share, with what the layer before has left, and the first term to read.

    Args:
        plan: the layer's plan.
        tokens: the tokens; what they carry is taken.
        before: under what name the layer before has left its latents, or None.

    Returns:
        ``[n, latent heads, width]`` FP32, which belongs to the caller, and the first term that it has not.
    """
    terms = plan.key_terms
    carried = tokens.take_carried(before) if before is not None and len(terms) > 1 else None
    if carried is not None and terms[-1].adds:
        latents, first = carried, len(terms) - 1
    else:
        latents, first = _empty(plan, tokens, terms), 0
        if carried is not None:
            latents[:, :, : carried.shape[2]] = carried
            first = len(terms) - 1
    return latents, first


def _empty(plan: AttentionLayerPlan, tokens: HotTokens, terms: Sequence[LatentTerm]) -> torch.Tensor:
    """Room for a latent, ``[n, latent heads, width]`` FP32."""
    streams = [plan.layouts[term.page].streams[term.stream] for term in terms]
    width = sum(stream.width for term, stream in zip(terms, streams, strict=True) if not term.adds)
    return torch.empty(tokens.count, streams[0].num_heads, width, device=tokens.slots.device)


def _multiply(latents: torch.Tensor, up: torch.Tensor | None, heads: torch.Tensor) -> None:
    """``[n, latent heads, width]`` times ``[kv_heads, width, head_size]``, into ``[n, kv_heads, head_size]``."""
    if up is None:
        heads.copy_(latents)
        return
    rows = latents.transpose(0, 1).expand(up.shape[0], -1, -1)
    heads.copy_(torch.bmm(rows, up).transpose(0, 1))


class UpProjections:
    """Up-projections in the model's dtype.

    Attributes:
        key: ``[num_kv_heads, width, head_size]``, or None where ``both`` is there.
        value: likewise, or None, too, where value latents are the values.
        both: ``[width, 2 * num_kv_heads * head_size]``, where keys and values of all heads have one latent.
    """

    def __init__(self, plan: AttentionLayerPlan, dtype: torch.dtype) -> None:
        projection, device = plan.projection, plan.device
        up_value = projection.up_value
        term = plan.key_terms[0]
        heads = plan.layouts[term.page].streams[term.stream].num_heads
        self.key = self.value = self.both = None
        if heads == 1 and plan.key_terms == plan.value_terms and up_value is not None:
            columns = [up.transpose(0, 1).flatten(1) for up in (projection.up_key, up_value)]
            self.both = torch.cat(columns, 1).to(device, dtype)
            return
        self.key = projection.up_key.to(device, dtype)
        self.value = None if up_value is None else up_value.to(device, dtype)


@per_object
def up_projections(plan: AttentionLayerPlan, dtype: torch.dtype) -> UpProjections:
    """Those of a layer, made on first use and forgotten together with the plan."""
    return UpProjections(plan, dtype)
