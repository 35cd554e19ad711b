"""The process that imports vLLM, and its plugins."""

import os

from xquant_vllm.diagnosis.child import Found, find_out, tell

VLLM_SECTIONS = ("version", "platform", "backends", "cache_root", "flash_attention")
"""What is asked, in this order."""


def ask_vllm() -> Found:
    """Ask in a process of its own; see ``VLLM_SECTIONS``."""
    return find_out(__name__)


def main() -> None:
    """Answer, in that process."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from xquant_vllm.plugin import probe

    ask = (
        probe.vllm_version,
        probe.platform_type,
        probe.registered_backends,
        probe.cache_root,
        probe.flash_attention,
    )
    tell(zip(VLLM_SECTIONS, ask, strict=True))
