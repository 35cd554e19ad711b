"""What vLLM says of itself and of this plugin, for ``xquant doctor``. Every function may raise what vLLM raises."""

import os
from typing import Any

from xquant_vllm.plugin.registration import BACKENDS


def vllm_version() -> str:
    """Of the vLLM that is imported."""
    import vllm

    return str(vllm.__version__)


def platform_type() -> str:
    """``"cpu"``, ``"cuda"``, ...; empty where vLLM knows no platform."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type or "")


def registered_backends() -> list[str]:
    """Those of this package's backends that are known once vLLM has loaded its plugins, as a server does."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    return [name for name in BACKENDS if name in AttentionBackendEnum.__members__]


def cache_root() -> str:
    """The folder that vLLM caches in."""
    from vllm import envs

    return os.path.expanduser(str(envs.VLLM_CACHE_ROOT))


def flash_attention() -> dict[str, Any]:
    """The version of vLLM's FlashAttention that would attend to prompts, or None and why there is none."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.platforms import current_platform

    from xquant_vllm.plugin.flash import flash_version

    if not current_platform.is_cuda():
        return {"version": None, "why": f"vLLM runs on the platform {current_platform.device_type!r}, not on CUDA GPUs"}
    with set_current_vllm_config(VllmConfig()):
        version = flash_version(128, sinks=False, soft_cap=None)
    return {"version": version, "why": None if version else "vLLM has none for this GPU"}
