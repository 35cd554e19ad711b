"""Environment variables that decide how a server runs: these by name, and no others."""

from collections.abc import Mapping
from typing import Any

from xquant_vllm.plugin.unread.variables import OF_VLLM, READ, unread_variables

# None of them holds a secret. What is added here is printed in bug reports.
NAMED = (
    *READ,
    OF_VLLM,
    "VLLM_PLUGINS",
    "VLLM_CACHE_ROOT",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_DISABLE_COMPILE_CACHE",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_PP_LAYER_PARTITION",
    "VLLM_TARGET_DEVICE",
    "VLLM_WORKER_MULTIPROC_METHOD",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TRITON_CACHE_DIR",
    "TRITON_HOME",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "CC",
    "CXX",
    "CXXFLAGS",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)


def environment_facts(environment: Mapping[str, str]) -> dict[str, Any]:
    """``variables``: those of ``NAMED`` that are set; ``unread``: names of this package's that nobody reads."""
    return {
        "variables": {name: environment[name] for name in NAMED if name in environment},
        "unread": unread_variables(environment),
    }
