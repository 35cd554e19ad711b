"""New weights for a running model: refused before vLLM takes its layers apart, so that it goes on with the old ones."""

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import nn
from vllm.model_executor.model_loader import reload
from vllm.model_executor.model_loader.reload import inplace, layerwise

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.refusals import announced

_GUARDS = "_xquant_guards"
_factorized: "WeakSet[nn.Module]" = WeakSet()


def guard_weights(model: Any) -> None:
    """Have every way to load weights into a model refused from now on.

    vLLM has three: its own reloading, which first moves all layers to the meta device; single parameters in the form
    that its kernels read; and the model's ``load_weights``, which writes to the parameters that are there.

    Args:
        model: the model, whose key and value projections are factorized.
    """
    _factorized.add(model)
    model.load_weights = _refuse
    for module in (reload, inplace, layerwise):
        _guard(module, "initialize_layerwise_reload")
    _guard(inplace, "get_parameter_for_reload")


def _guard(module: Any, function: str) -> None:
    """Wrap a function of vLLM's whose first argument is a model, once per process."""
    original: Callable[..., Any] = getattr(module, function)
    if getattr(original, _GUARDS, False):
        return

    @functools.wraps(original)
    def guarded(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(part in _factorized for part in model.modules()):
            _refuse()
        return original(model, *args, **kwargs)

    setattr(guarded, _GUARDS, True)
    setattr(module, function, guarded)


@announced()
def _refuse(*_: Any, **__: Any) -> None:
    """Stands in for whatever would load weights.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "xquant: new weights cannot be loaded into a running model, because the key and value projections are "
        "factorized; it keeps the weights that it has: start the server anew with the new ones"
    )
