"""What vLLM's worker is asked to do with weights: load new ones, or throw them away in its sleep."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.refusals import announced
from xquant_vllm.plugin.reload.record import Record, record_of
from xquant_vllm.plugin.reload.refusals import refuse, refuse_other_model


@functools.cache
def wrap_worker(begin: Callable[[Record], None], give_up: Callable[[Record], None]) -> None:
    """Refuse impossible weights before vLLM has changed anything, once per process.

    Args:
        begin: takes surgery back, or refuses to. It comes before vLLM looks for the names of the model's weights.
        give_up: ends a reloading that failed.
    """
    from vllm.v1.worker.gpu_worker import Worker

    worker: Any = Worker
    reload, sleep = worker.reload_weights, worker.sleep

    @functools.wraps(reload)
    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = record_of(self.model_runner.get_model())
        if record is None:
            return reload(self, *args, **kwargs)
        asked = inspect.signature(self.model_runner.reload_weights).bind(*args, **kwargs).arguments
        config = self.vllm_config.model_config
        if not asked.get("is_checkpoint_format", True):
            refuse("weights in the form of kernels (is_checkpoint_format=False) are those of a factorized model")
        folder = asked.get("weights_path")
        from_folder = asked.get("weights_iterator") is None
        record.own_folder = from_folder and folder in (None, config.model)
        try:
            if from_folder and not record.own_folder:
                refuse_other_model(config, str(folder))
            begin(record)
            names = config.model, config.model_weights, config.revision
            try:
                return reload(self, *args, **kwargs)
            except BaseException:
                # vLLM has named the new folder by then.
                config.model, config.model_weights, config.revision = names
                if record.open:
                    give_up(record)
                raise
        finally:
            record.own_folder = False

    @functools.wraps(sleep)
    @announced()
    def refusing_sleep(self: Any, level: int = 1) -> Any:
        if level > 1 and record_of(self.model_runner.get_model()) is not None:
            raise UnsupportedError(
                f"xquant: sleep at level {level} throws away the matrices that keys and values are made with, which "
                "are no weights that vLLM could load; sleep at level 1"
            )
        return sleep(self, level)

    worker.reload_weights, worker.sleep = reload_weights, refusing_sleep
