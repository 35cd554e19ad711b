"""From the first to the last of new weights: around vLLM's reloading of layers surgery is taken back and done again."""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.model_executor.model_loader import reload
from vllm.model_executor.model_loader.reload import inplace, layerwise

from xquant_vllm.errors import RefusedError
from xquant_vllm.plugin.hot.worker import hot_maps
from xquant_vllm.plugin.refusals import announced
from xquant_vllm.plugin.reload.engine_core import count_change, watch_engine_core
from xquant_vllm.plugin.reload.linears import lost_weights
from xquant_vllm.plugin.reload.record import Record, record_of
from xquant_vllm.plugin.reload.refusals import refuse, refuse_impossible
from xquant_vllm.plugin.reload.worker import wrap_worker

logger = logging.getLogger("vllm.xquant_vllm")

_GUARDS = "_xquant_guards"


def serve_new_weights(model: Any) -> None:
    """Have new weights loaded into a model that was operated on, or refused, whichever way they come.

    vLLM has three: its own reloading of layers, which the ``reload_weights`` of a worker and engines for weight
    transfer use; single parameters in the form that its kernels read; and the model's ``load_weights``, which writes to
    the parameters that are there. The last two are refused, except for ``load_weights`` while layers are reloaded.

    Args:
        model: the model, with its record.
    """
    model.load_weights = functools.partial(_load_weights, model)
    for module in (reload, inplace, layerwise):
        _wrap(module, "initialize_layerwise_reload", _begin)
        _wrap(module, "finalize_layerwise_reload", _end)
    _wrap(inplace, "get_parameter_for_reload", _refuse_parameter)
    wrap_worker(_open, _give_up)
    watch_engine_core()


def _wrap(module: Any, function: str, wrapper: Callable[..., Any]) -> None:
    """Wrap a function of vLLM's whose first argument is a model, once per process."""
    original: Callable[..., Any] = getattr(module, function)
    if getattr(original, _GUARDS, False):
        return

    @functools.wraps(original)
    def guarded(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        record = record_of(model)
        if record is None:
            return original(model, *args, **kwargs)
        return wrapper(functools.partial(original, model, *args, **kwargs), record)

    setattr(guarded, _GUARDS, True)
    setattr(module, function, guarded)


def _open(record: Record) -> None:
    """Take surgery back, if new weights can be served."""
    refuse_impossible(record)
    count_change()
    record.take_back()


def _begin(original: Callable[[], Any], record: Record) -> Any:
    if not record.open:
        _open(record)
    try:
        return original()
    except BaseException:
        _give_up(record)
        raise


@announced()
def _end(original: Callable[[], Any], record: Record) -> Any:
    if not record.open:
        return original()
    start = time.perf_counter()
    try:
        result = original()
    except BaseException:
        _give_up(record)
        raise
    try:
        record.operate()
    finally:
        _process_tied(record.model)
        _forget_pages(record)
    logger.info("xquant: new weights are served, factorized in %.1f s", time.perf_counter() - start)
    return result


@announced()
def _load_weights(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own ``load_weights``, while its layers are reloaded."""
    record = record_of(model)
    if record is None or not record.open:
        refuse("they would be written to projections that are factorized by now; use reload_weights")
    assert record is not None
    try:
        loaded = type(model).load_weights(model, *args, **kwargs)
        lost = lost_weights(record.model, loaded or ())
        if lost:
            raise RefusedError(
                f"xquant: new weights were lost: {type(model).__name__} writes {lost[0]} (and {len(lost) - 1} more) "
                "past its loaders, as reloading in vLLM does not foresee; start the server anew with the new weights"
            )
        return loaded
    except BaseException:
        _give_up(record)
        raise


def _refuse_parameter(original: Callable[[], Any], record: Record) -> Any:
    refuse("single parameters in the form of kernels (is_checkpoint_format=False) are those of a factorized model")


def _give_up(record: Record) -> None:
    """End a reloading that failed: layers that were not loaded get back what they had, so that the engine goes on."""
    for layer in record.model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
    layerwise.finalize_layerwise_processing(record.model, record.vllm_config.model_config)
    record.put_back()
    _process_tied(record.model)
    _forget_pages(record)


def _process_tied(model: nn.Module) -> None:
    """Have packed again what a layer has packed of a weight that belongs to another layer, as a tied output head has.

    vLLM loads such a weight into the other layer alone.
    """
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or not weight.numel():
            continue
        if owners.setdefault(id(weight), module) is not module and hasattr(module, "cpu_linear"):
            method: Any = module.quant_method
            method.process_weights_after_loading(module)


def _forget_pages(record: Record) -> None:
    """Nothing that was made with the old weights may be attended."""
    count_change()
    for hot_map in hot_maps(record.vllm_config):
        hot_map.clear()
