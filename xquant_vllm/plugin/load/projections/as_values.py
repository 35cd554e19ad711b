"""One norm for queries and keys (Llama 4, Muse Glimmer), which cannot be taken away: queries need it.

Nor can its call for queries be told from that for keys when the model runs. So latents pass by where nothing is done to
them: as values. The model's code sees twice as many kv heads, with key and value latents side by side, normalizes and
drops those that it takes for keys, and hands on those that it takes for values.
"""

from typing import Any

import torch
from torch import nn

from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.call import exchange
from xquant_vllm.plugin.load.projections.rows import behind_queries
from xquant_vllm.plugin.load.recognize import AttentionParts


class LatentsAsValues(nn.Module):
    """In place of a fused projection: key and value latents side by side, once for keys and once for values."""

    def __init__(self, projection: nn.Module, q_size: int) -> None:
        """Wrap what projects to ``q_size`` channels of queries, then to latents of keys and values."""
        super().__init__()
        self.projection = projection
        self.q_size = q_size

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Queries and twice the latents of ``x`` ``[..., hidden_size]``, side by side, as the projection answers."""
        answer = self.projection(x)
        if isinstance(answer, torch.Tensor):
            return self._twice(answer)
        output, bias = answer
        return self._twice(output), None if bias is None else self._twice(bias)

    def _twice(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat((rows, rows[..., self.q_size :]), -1)


def refuse_other_layouts(parts: AttentionParts) -> None:
    """Refuse a module with such a norm in which nothing can pass as values.

    Raises:
        UnsupportedError: its rows are not queries, keys and values one after the other, or it does not count them.
    """
    if not behind_queries(parts) or not hasattr(parts.module, "kv_size"):
        raise unsupported_model(
            f"{type(parts.module).__name__} at {parts.name} normalizes queries and keys by one module "
            f"({parts.key_norm_child}), which is not supported unless its {parts.key.child} makes queries, keys and "
            "values one after the other"
        )


def pass_as_values(parts: AttentionParts, stand_in: nn.Module) -> dict[str, nn.Module]:
    """Let the latents of a module pass as values.

    Args:
        parts: the module's parts; its rows are down-projections by now.
        stand_in: takes the place of its projection when that cannot run yet.

    Returns:
        What stands in from now on, by path.
    """
    module: Any = parts.module
    child = parts.key.child
    exchange(module, child, LatentsAsValues(module.get_submodule(child), parts.q_size))
    for owner, name in ((module, "kv_size"), (module, "num_kv_heads"), (parts.attention, "num_kv_heads")):
        if hasattr(owner, name):
            setattr(owner, name, 2 * getattr(owner, name))
    return {child: LatentsAsValues(stand_in, parts.q_size)}
