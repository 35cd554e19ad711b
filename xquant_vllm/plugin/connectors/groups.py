"""What a connector knows of vLLM's KV cache groups."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec, iter_layer_specs

from xquant_vllm.errors import UnsupportedError


@dataclass(frozen=True)
class PageGroup:
    """Layers that share a block table.

    Attributes:
        block_size: tokens of a block.
        window: keys that a query sees, itself included; None for all.
        layers: their names, on this rank.
    """

    block_size: int
    window: int | None
    layers: tuple[str, ...]

    def needed(self, start: int, end: int) -> range:
        """Blocks, counted from the first of a sequence, that must be loaded when ``end`` tokens are computed.

        Args:
            start: tokens that are there already, whole blocks.
            end: tokens that shall be there, whole blocks.
        """
        # The next token sees itself and window - 1 before.
        seen = 0 if self.window is None else max(0, end - self.window + 1)
        return range(max(start, seen) // self.block_size, end // self.block_size)


def page_groups(kv_cache_config: KVCacheConfig, connector: str) -> tuple[PageGroup, ...]:
    """The groups of an engine, in their order.

    Args:
        kv_cache_config: vLLM's.
        connector: what the connector that moves them is called.

    Raises:
        UnsupportedError: one keeps something else than a page for every block of tokens.
    """
    groups = []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        specs = list(iter_layer_specs(group.kv_cache_spec))
        windows = {_window(spec, connector, group.layer_names[0]) for spec in specs}
        if len(windows) > 1 or index not in kv_cache_config.prefix_cacheable_group_ids:
            raise _refuse(connector, group.layer_names[0], "shares its block table with layers of another kind")
        groups.append(PageGroup(group.kv_cache_spec.block_size, windows.pop(), tuple(group.layer_names)))
    return tuple(groups)


def common_step(groups: Sequence[PageGroup]) -> int:
    """Tokens from one key to the next: every block ends at one."""
    return math.gcd(*(group.block_size for group in groups))


def common_end(groups: Sequence[PageGroup]) -> int:
    """Tokens of which every group has whole blocks."""
    return math.lcm(*(group.block_size for group in groups))


def _window(spec: Any, connector: str, layer: str) -> int | None:
    # By the class itself: what is derived from it keeps other things.
    if type(spec) is FullAttentionSpec:
        return None
    if type(spec) is SlidingWindowSpec:
        return int(spec.sliding_window)
    raise _refuse(connector, layer, f"keeps its cache as {type(spec).__name__}")


def pages_of(groups: Sequence[PageGroup], caches: Mapping[str, torch.Tensor]) -> list[Any]:
    """What is known of the pages of every group, as JSON has it.

    Args:
        groups: of an engine.
        caches: by layer ``[num_blocks, ...]``, whatever a page's shape and dtype are.
    """
    return [
        [group.block_size, group.window, [_page_of(layer, caches[layer]) for layer in group.layers]] for group in groups
    ]


def _page_of(layer: str, cache: torch.Tensor) -> list[Any]:
    return [layer, list(cache.shape[1:]), str(cache.dtype)]


def _refuse(connector: str, layer: str, problem: str) -> UnsupportedError:
    return UnsupportedError(
        f"xquant: the connector {connector} does not support this model: {layer} {problem}; leave "
        "--kv-transfer-config out"
    )
