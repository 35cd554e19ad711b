"""Gathers facts of a machine and of its environment: the object that ``xquant doctor --json`` prints."""

import os
from typing import Any

from xquant_vllm.diagnosis.caches import caches
from xquant_vllm.diagnosis.child import Found
from xquant_vllm.diagnosis.compilers import compilers
from xquant_vllm.diagnosis.entry_point import entry_point_facts
from xquant_vllm.diagnosis.environment import environment_facts
from xquant_vllm.diagnosis.findings import ERROR, findings
from xquant_vllm.diagnosis.kernel_probe import ask_kernels
from xquant_vllm.diagnosis.kernel_table import kernel_table
from xquant_vllm.diagnosis.processor import processor
from xquant_vllm.diagnosis.versions import SUPPORTED, installed_versions
from xquant_vllm.diagnosis.vllm_probe import VLLM_SECTIONS, ask_vllm

SCHEMA = 1
"""Raised when a name of the object changes its meaning or goes; names may be added."""

_NOTHING = Found({}, {}, None)


def examine() -> dict[str, Any]:
    """Everything, and whether a server can be started.

    Neither torch nor vLLM is imported in this process: both are, in processes of their own.

    Returns:
        As JSON: ``schema``, ``can_serve``, ``problems`` (``severity``, ``problem``, ``remedy``), ``versions``,
        ``supported``, ``processor``, ``gpus``, ``vllm``, ``kernels``, ``attention``, ``compilers``, ``caches`` and
        ``environment``. It has paths, and variables by name, and no other values of the environment.
    """
    versions, machine = installed_versions(), processor()
    vllm = ask_vllm() if versions["vllm"] is not None else _NOTHING
    kernels = ask_kernels(vllm.sections.get("platform")) if versions["torch"] is not None else _NOTHING
    facts: dict[str, Any] = {
        "versions": versions,
        "supported": SUPPORTED,
        "processor": machine,
        "gpus": kernels.sections.get("gpus", []),
        "vllm": _vllm(vllm),
        "kernels": {
            "choice": kernels.sections.get("choice"),
            "table": kernel_table(kernels, vllm.sections.get("flash_attention"), machine),
            "torch": kernels.sections.get("torch"),
            "errors": {name: error for name, error in kernels.errors.items() if name != "attention"},
            "ended": kernels.ended,
        },
        "attention": {
            "results": kernels.sections.get("attention", []),
            "error": kernels.errors.get("attention") if "choice" in kernels.sections else None,
        },
        "compilers": compilers(),
        "caches": caches(os.environ, vllm.sections.get("cache_root")),
        "environment": environment_facts(os.environ),
    }
    problems = findings(facts)
    can_serve = all(problem.severity != ERROR for problem in problems)
    return {
        "schema": SCHEMA,
        "can_serve": can_serve,
        "problems": [problem._asdict() for problem in problems],
        **facts,
    }


def _vllm(found: Found) -> dict[str, Any]:
    errors = dict(found.errors)
    if found.ended is not None:
        errors |= {name: found.ended for name in VLLM_SECTIONS if name not in {*errors, *found.sections}}
    return {
        "version": found.sections.get("version"),
        "platform": found.sections.get("platform"),
        "entry_point": entry_point_facts(os.environ),
        "backends": found.sections.get("backends"),
        "flash_attention": found.sections.get("flash_attention"),
        "error": errors.get("version") or errors.get("platform"),
        "errors": errors,
    }
