"""Environment variables that name this package and that nobody reads. Imports neither torch nor vLLM."""

import difflib
from collections.abc import Mapping

PREFIX = "XQUANT_"

READ = {
    "XQUANT_ATTENTION_KERNELS": "kernels to use instead of those for this machine",
}
"""What a server reads, and what it is for."""

READ_ELSEWHERE = (
    # setup.py
    "XQUANT_BUILD_KERNELS",
    # tools and tests of the repository
    "XQUANT_FAMILIES_FOUND",
    "XQUANT_TEST_GPU_WORKER",
    "XQUANT_TORCH_INDEX",
)
"""What the installation reads, and tools of the repository."""

OF_VLLM = "VLLM_ATTENTION_BACKEND"
"""By which older versions of vLLM were told the backend; those that are supported here do not read it."""


def unread_variables(environment: Mapping[str, str]) -> list[str]:
    """Names of the variables that nobody reads.

    Args:
        environment: the process's.
    """
    known = (*READ, *READ_ELSEWHERE)
    return [name for name in sorted(environment) if name.startswith((PREFIX, f"VLLM_{PREFIX}")) and name not in known]


def about_unread(name: str) -> str:
    """The line for one of them: what it is, and what to do. Its value is not told."""
    close = difflib.get_close_matches(name.removeprefix("VLLM_"), READ, n=1)
    hint = f"did you mean {close[0]}? Else" if close else "settings are given by --additional-config;"
    return f"the environment variable {name} has no effect, because nothing reads it: {hint} unset it"


def asked_by_variable(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The backend of these, in small letters, that :data:`OF_VLLM` asks for in vain; None if it names no such."""
    asked = environment.get(OF_VLLM, "").strip().lower()
    return asked if asked in {name.lower() for name in names} else None


def about_variable(backend: str) -> str:
    """The line for :data:`OF_VLLM`."""
    return (
        f"the environment variable {OF_VLLM}={backend.upper()} has no effect, because vLLM does not read it any more; "
        f"set --attention-backend {backend}"
    )
