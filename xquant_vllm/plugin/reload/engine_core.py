"""Pages that were made with old weights are forgotten by the scheduler, in whatever process it is."""

import functools
import sys
from typing import Any

from xquant_vllm.plugin.registration import BACKEND_NAME, selected_backends

_MODULE = "vllm.v1.engine.core"
_GUARDS = "_xquant_guards"
_changes = [0]


def count_change() -> None:
    """Note that the weights of a model in this process are not those that its pages were made with."""
    _changes[0] += 1


def changes_of(worker: Any) -> int:
    """How often weights have changed in a worker's process; called there."""
    return _changes[0]


def watch_engine_core() -> None:
    """Let the core of an engine drop its prefix cache once its workers have new weights, once per process.

    Latents are read by matrices of the weights that they were made with: unlike keys and values, those of old weights
    mean nothing. Requests that run are preempted, and compute their pages anew. Only where engine cores are made.
    """
    module: Any = sys.modules.get(_MODULE)
    if module is None or getattr(module.EngineCore.collective_rpc, _GUARDS, False):
        return
    original = module.EngineCore.collective_rpc

    @functools.wraps(original)
    def collective_rpc(self: Any, *args: Any, **kwargs: Any) -> Any:
        if BACKEND_NAME not in selected_backends(self.vllm_config.attention_config):
            return original(self, *args, **kwargs)
        before = self.model_executor.collective_rpc(changes_of)
        try:
            result = original(self, *args, **kwargs)
        except Exception:
            _forget_pages(self, before)
            raise
        _forget_pages(self, before)
        return result

    setattr(collective_rpc, _GUARDS, True)
    module.EngineCore.collective_rpc = collective_rpc


def _forget_pages(core: Any, before: list[int]) -> None:
    if core.model_executor.collective_rpc(changes_of) != before:
        core.reset_prefix_cache(reset_running_requests=True)
