"""Adapters (LoRA) are served, except for those of keys and values, which are refused when they are loaded.

Adapters are wrapped around a model's layers after surgery. The rows of queries in ``qkv_proj`` are still the model's,
so what an adapter adds to queries is added to them. The other rows make latents, which all requests read by the same
matrices: what an adapter adds to keys or values has no place there.
"""

import functools
from collections.abc import Iterator
from typing import Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.refusals import announced
from xquant_vllm.plugin.registration import BACKEND_NAME


@functools.cache
def watch_adapters() -> None:
    """Refuse adapters that cannot be served when they are loaded, before one takes the place of another; once."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    manager: Any = WorkerLoRAManager
    original = manager._load_adapter

    @functools.wraps(original)
    @announced()
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        adapter = original(self, lora_request)
        names = sorted(_unserved(self._adapter_manager, adapter))
        if names:
            raise UnsupportedError(
                f"xquant: the adapter {lora_request.lora_name!r} ({lora_request.lora_path}) changes {names[0]} (and "
                f"{len(names) - 1} more projections) of layers whose keys and values are factorized: adapters may "
                "change queries, outputs and what is not attention; merge it into the checkpoint, or train one without "
                "keys and values"
            )
        return adapter

    manager._load_adapter = _load_adapter


def _unserved(manager: Any, adapter: Any) -> Iterator[str]:
    """Names of what an adapter changes that is not served.

    Args:
        manager: vLLM's ``LoRAModelManager``.
        adapter: its ``LoRAModel``, one entry for every projection of the checkpoint.
    """
    layers = [name for name, module in manager.model.named_modules() if _is_factorized(module)]
    for owner in {name.rpartition(".")[0] for name in layers}:
        served = set(_served(manager, owner, adapter))
        for name, weights in adapter.loras.items():
            if name.startswith(f"{owner}.") and name not in served and _adds(weights):
                yield name


def _is_factorized(module: Any) -> bool:
    return isinstance(module, Attention) and getattr(module.impl, "backend_name", None) == BACKEND_NAME


def _served(manager: Any, owner: str, adapter: Any) -> Iterator[str]:
    """Names of an attention module's projections that an adapter may change."""
    for name, wrapper in manager.modules.items():
        if not name.startswith(f"{owner}."):
            continue
        base, parts = wrapper.base_layer, manager.packed_modules.get(name, [name])
        if isinstance(base, RowParallelLinear):
            yield name
        elif type(base) is QKVParallelLinear and name == f"{owner}.qkv_proj":
            if len(parts) == 3:
                yield parts[0]
            elif name in adapter.loras:
                # One projection in the checkpoint, too: its first rows are those of the queries.
                rows = adapter.loras[name].lora_b[base.total_num_heads * base.head_size :]
                if not rows.any():
                    yield name


def _adds(weights: Any) -> bool:
    """Whether it changes anything: a fresh adapter is zero."""
    return bool(weights.lora_a.any() and weights.lora_b.any())
