"""Backends and metadata builders that are not this package's own, but derived from them."""

from typing import Any

from vllm.config import get_current_vllm_config_or_none

from xquant_vllm.plugin.attention_kinds import wrapper_problem
from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.refusals import announced
from xquant_vllm.plugin.registration import BACKEND_NAME, KIVI_BACKEND_NAME

PACKAGE = __name__.partition(".")[0]
_KIVI = f"{PACKAGE}.kivi."


@announced()
def raise_for_wrapper(derived: Any) -> None:
    """Refuse the layers that a derived class is for.

    Args:
        derived: a class derived from a backend or a metadata builder of this package.

    Raises:
        UnsupportedError: always; it names the model and what is special about its layers.
    """
    config = get_current_vllm_config_or_none()
    model = None if config is None else config.model_config
    who = "a model" if model is None else f"{model.architecture} ({model.model})"
    ours = {kind.__module__ for kind in derived.__mro__ if kind.__module__.startswith(f"{PACKAGE}.")}
    backend = KIVI_BACKEND_NAME if any(module.startswith(_KIVI) for module in ours) else BACKEND_NAME
    raise unsupported_model(f"{who} uses {wrapper_problem(derived.__name__)}, which is not supported", backend)
