"""Entry point of the group ``vllm.general_plugins``; vLLM calls it once in every process."""

import logging
from typing import Any

logger = logging.getLogger("vllm.xquant_vllm")


def register() -> None:
    """Make ``--attention-backend xquant`` and ``kivi`` known to vLLM. Idempotent; changes nothing for other backends.

    Everything heavy waits until a backend is selected: the platform checks act only on configurations that ask for
    it, and the loader hook is installed when the first layer is built for it. Where no backend is selected, settings
    that are meant for one are warned of.
    """
    import vllm

    from xquant_vllm.plugin.compat import unsupported_reason

    reason = unsupported_reason(vllm.__version__)
    if reason is not None:
        logger.warning(reason)
        return

    from xquant_vllm.plugin.platform import wrap_platform
    from xquant_vllm.plugin.refusals import unwrap_from_validation
    from xquant_vllm.plugin.registration import BACKENDS, get_member
    from xquant_vllm.plugin.reload.engine_core import watch_engine_core

    for name in BACKENDS:
        get_member(name)
    wrap_platform()
    unwrap_from_validation(_look, _then)
    watch_engine_core()


def _look(arguments: Any, vllm_config: Any) -> None:
    from xquant_vllm.plugin.unread.report import report_unread

    report_unread(arguments, vllm_config)


def _then(arguments: Any, vllm_config: Any) -> None:
    from xquant_vllm.plugin.observe.front_end import share_metrics

    share_metrics(arguments, vllm_config)
