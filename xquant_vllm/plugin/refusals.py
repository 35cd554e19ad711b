"""How this package's errors reach the user of a server: in one line of the log, and as the last line of a traceback."""

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xquant_vllm.errors import XQuantError
from xquant_vllm.plugin.making import Look, look_once, making

logger = logging.getLogger("vllm.xquant_vllm")

_ARGUMENTS_MODULE = "vllm.engine.arg_utils"
_UNWRAPS = "_xquant_unwraps"


@contextmanager
def announced() -> Iterator[None]:
    """Log an error of this package at level ERROR, once, before the traceback that its way up will leave.

    Also a decorator. Every place where vLLM calls this package, and may be refused, is in such a context.
    """
    try:
        yield
    except XQuantError as error:
        if "announced" not in vars(error):
            vars(error)["announced"] = True
            for line in str(error).splitlines():
                logger.error("%s", line)
        raise


def unwrap_from_validation(look: Look, then: Look) -> None:
    """Keep pydantic, which validates vLLM's configurations, from burying an error of this package in its own.

    Once per process, and only where configurations are made.

    Args:
        look: called when the configuration is made, or before it is calibrated, which takes minutes.
        then: called when it is made.
    """
    module: Any = sys.modules.get(_ARGUMENTS_MODULE)
    if module is None or getattr(module.EngineArgs.create_engine_config, _UNWRAPS, False):
        return
    original = module.EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from pydantic import ValidationError

        try:
            _look_into_folder(self)
            with making(self, look):
                config = original(self, *args, **kwargs)
                with announced():
                    look_once(config)
                    then(self, config)
            return config
        except XQuantError:
            raise
        except Exception as error:
            found = error.errors() if isinstance(error, ValidationError) else []
            causes = [problem.get("ctx", {}).get("error") for problem in found]
            ours = next((cause for cause in causes if isinstance(cause, XQuantError)), None)
            if ours is None:
                raise
        raise ours.with_traceback(None) from None

    setattr(create_engine_config, _UNWRAPS, True)
    module.EngineArgs.create_engine_config = create_engine_config


@announced()
def _look_into_folder(arguments: Any) -> None:
    """Refuse factors in the model's folder before vLLM reads it, which may fail in words of its own, or never end."""
    from xquant_vllm.plugin.engine_factors import check_folder
    from xquant_vllm.plugin.registration import BACKEND_NAME

    asked = arguments.attention_backend or getattr(arguments.attention_config, "backend", None)
    if str(getattr(asked, "name", asked)).upper() == BACKEND_NAME:
        check_folder(arguments.model)
