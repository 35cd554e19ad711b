"""Entry point of the group ``vllm.general_plugins``; vLLM calls it once in every process."""

import logging

logger = logging.getLogger("vllm.xquant_vllm")


def register() -> None:
    """Make ``--attention-backend xquant`` known to vLLM. Idempotent; changes nothing for other backends.

    Everything heavy waits until the backend is selected: the platform checks act only on configurations that ask for
    it, and the loader hook is installed when the first layer is built with it.
    """
    import vllm

    from xquant_vllm.integration.compat import unsupported_reason

    reason = unsupported_reason(vllm.__version__)
    if reason is not None:
        logger.warning(reason)
        return

    from xquant_vllm.integration.platform import wrap_platform
    from xquant_vllm.integration.registration import get_member

    get_member()
    wrap_platform()
