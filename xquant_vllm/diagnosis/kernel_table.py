"""Every implementation of attention: whether it is used, and if not, why."""

from collections.abc import Mapping
from typing import Any

from xquant_vllm.diagnosis.child import Found
from xquant_vllm.diagnosis.processor import NEEDED, missing_flags


def kernel_table(kernels: Found, flash: Any, processor: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each: ``name``, ``used``, ``why``.

    Args:
        kernels: see :func:`xquant_vllm.diagnosis.kernel_probe.ask_kernels`.
        flash: what vLLM says of its FlashAttention, or None.
        processor: see :func:`xquant_vllm.diagnosis.processor.processor`.
    """
    choice = kernels.sections.get("choice") or {}
    kind = choice.get("kind")
    rows = [_cpp_row(isa, kernels, processor) for isa in NEEDED]
    rows.append({"name": "Triton", "used": kind == "triton", "why": _why_triton(kernels, kind)})
    version = (flash or {}).get("version")
    rows.append(
        {
            "name": "vLLM's FlashAttention (prompts on GPUs)",
            "used": kind == "triton" and version is not None,
            "why": f"version {version}" if version else (flash or {}).get("why") or "vLLM could not be asked",
        }
    )
    why = "there is nothing faster here" if kind == "reference" else "the fallback of all others"
    rows.append({"name": "PyTorch reference", "used": kind == "reference", "why": why})
    return rows


def _cpp_row(isa: str, kernels: Found, processor: Mapping[str, Any]) -> dict[str, Any]:
    cpp, choice = kernels.sections.get("cpp"), kernels.sections.get("choice") or {}
    used = choice.get("kind") == "cpp" and choice.get("instruction_set") == isa
    missing = missing_flags(isa, processor["flags"])
    if used:
        why = "the fastest here" if cpp and isa == cpp["best"] else "asked for by XQUANT_ATTENTION_KERNELS"
    elif cpp is None:
        why = f"the library cannot be loaded: {_error_of(kernels, 'cpp')}"
    elif isa not in cpp["there"]:
        of_amx = cpp["why_no_amx"] if isa == "amx" and not missing else None
        lacks = f"the processor lacks {', '.join(missing)}" if missing else None
        why = of_amx or lacks or "this build lacks it"
    elif choice.get("kind") == "cpp":
        why = f"{choice['instruction_set']} is used"
    else:
        why = f"vLLM runs on {choice.get('device', 'another device')}"
    return {"name": f"C++ for {isa}", "used": used, "why": why}


def _why_triton(kernels: Found, kind: str | None) -> str:
    if kind == "triton":
        return f"version {(kernels.sections.get('triton') or {}).get('version')}"
    if "triton" in kernels.errors:
        return f"cannot be imported: {kernels.errors['triton']}"
    torch = kernels.sections.get("torch") or {}
    return "torch sees no GPU" if not torch.get("gpu_seen") else "vLLM does not run on the GPU"


def _error_of(kernels: Found, section: str) -> str:
    return kernels.errors.get(section) or kernels.ended or "not asked"
