"""Which vLLM releases this package was tested with."""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# The seams used here (AttentionBackendEnum.register, state_content_bytes) exist from 0.32 on and are the same in 0.33.
SUPPORTED_VLLM = ">=0.32,<0.34"


def unsupported_reason(vllm_version: str) -> str | None:
    """Why a vLLM version is not supported, as one line for the log, or None if it is."""
    base = Version(vllm_version).base_version
    if Version(base) in SpecifierSet(SUPPORTED_VLLM):
        return None
    return (
        f"xquant: not registered, because vLLM {vllm_version} is installed and this xquant-vllm supports "
        f"{SUPPORTED_VLLM}; install a vLLM in that range, or another release of xquant-vllm"
    )
