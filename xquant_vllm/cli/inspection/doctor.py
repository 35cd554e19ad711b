"""``xquant doctor``: the facts in words, or as JSON."""

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from xquant_vllm.cli.inspection.amounts import amount
from xquant_vllm.diagnosis.doctor import examine


def run(options: argparse.Namespace) -> int:
    """Run the command.

    Args:
        options: what :mod:`xquant_vllm.cli.inspection.arguments` parsed.

    Returns:
        The exit status: 0 if a server can be started, 1 if not.
    """
    facts = examine()
    print(json.dumps(facts, indent=1) if options.json else "\n".join(in_words(facts)), flush=True)
    return 0 if facts["can_serve"] else 1


def in_words(facts: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a report.

    Args:
        facts: see :func:`xquant_vllm.diagnosis.doctor.examine`.
    """
    yield "versions"
    yield from _versions(facts)
    yield "plugin"
    yield from _plugin(facts["vllm"])
    yield "machine"
    yield from _machine(facts)
    yield "kernels (* is used)"
    for row in facts["kernels"]["table"]:
        yield f"{'*' if row['used'] else ' '} {row['name']}: {row['why']}"
    yield "a tiny attention, against the PyTorch reference"
    yield from _attention(facts["attention"])
    yield "compilers"
    for name, of in facts["compilers"].items():
        there = of["version"] or of["command"] or "not there"
        yield f"  {name}: {there} ({of['needed_for']})"
    yield "caches"
    for name, of in facts["caches"].items():
        yield f"  {name}: {_folder(of)}"
    yield "environment"
    variables = facts["environment"]["variables"]
    for name, value in variables.items():
        yield f"  {name}={value}"
    if not variables:
        yield "  none of the variables that matter is set"
    yield ""
    for problem in facts["problems"]:
        yield f"{problem['severity']}: {problem['problem']}"
        yield f"  what to do: {problem['remedy']}"
    if facts["can_serve"]:
        yield "This machine can serve: vllm serve MODEL --attention-backend xquant"
    else:
        yield "This machine cannot serve with xquant yet: see the errors above."


def _versions(facts: Mapping[str, Any]) -> Iterator[str]:
    versions, supported = facts["versions"], facts["supported"]
    for name in ("xquant-vllm", "python", "torch", "vllm", "triton", "transformers"):
        needed = f" (supported: {supported[name]})" if name in supported else ""
        of = versions["vllm_distribution"]
        owner = f" from {of}" if name == "vllm" and of not in (None, "vllm") else ""
        yield f"  {name} {versions[name] or 'is not installed'}{owner}{needed}"
    yield f"  {versions['system']}, {versions['executable']}"


def _plugin(vllm: Mapping[str, Any]) -> Iterator[str]:
    point = vllm["entry_point"]
    yield f"  entry point: {point['found'] or 'not found'}{'' if point['allowed'] else ', not in VLLM_PLUGINS'}"
    if vllm["error"] is not None:
        yield f"  vLLM cannot be imported: {vllm['error']}"
    elif vllm["version"] is not None:
        backends = ", ".join(name.lower() for name in vllm["backends"] or ()) or "none"
        yield f"  backends that vLLM knows by it: {backends}; platform: {vllm['platform'] or 'none'}"


def _machine(facts: Mapping[str, Any]) -> Iterator[str]:
    machine = facts["processor"]
    yield f"  processor: {machine['model'] or 'unknown'}, {machine['architecture']}, {machine['cores']} cores to use"
    yield f"    of what kernels ask for: {' '.join(machine['flags']) or 'nothing'}"
    for gpu in facts["gpus"]:
        shared = gpu["shared_memory_of_a_program"]
        of = f", {shared:,} bytes of shared memory for a program" if shared else ""
        yield f"  GPU: {gpu['name']}, compute capability {gpu['compute_capability']}, {amount(gpu['memory'])}{of}"
    if not facts["gpus"]:
        yield "  GPU: torch sees none"


def _attention(attention: Mapping[str, Any]) -> Iterator[str]:
    for result in attention["results"]:
        error = "not finite" if result["error"] is None else f"{result['error']:.1e}"
        verdict = "ok" if result["passed"] else "WRONG"
        yield f"  {result['operation']}, {result['dtype']}: error {error}, at most {result['bound']:g}: {verdict}"
    if attention["error"] is not None:
        yield f"  failed: {attention['error']}"
    elif not attention["results"]:
        yield "  not tried"


def _folder(of: Mapping[str, Any]) -> str:
    if of["folder"] is None:
        return "no folder, because there is no home"
    held = f"{of['files']} files, {amount(of['bytes'])}" if of["exists"] else "not there yet"
    return f"{of['folder']}, {held}, {'writable' if of['writable'] else 'NOT writable'}"
