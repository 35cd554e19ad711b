"""From facts to what is wrong, and what to do."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from xquant_vllm.diagnosis.versions import SUPPORTED, is_supported
from xquant_vllm.plugin.registration import BACKENDS
from xquant_vllm.plugin.unread.variables import about_unread, about_variable, asked_by_variable

ERROR, WARNING = "error", "warning"


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        severity: ``ERROR``: nothing can be served with this package; ``WARNING``: it can, but slower, or not as asked.
        problem: what is wrong.
        remedy: what to do.
    """

    severity: str
    problem: str
    remedy: str


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """All that is wrong, errors first.

    Args:
        facts: as :func:`xquant_vllm.diagnosis.doctor.examine` gathers them.
    """
    found = [
        *_of_versions(facts["versions"]),
        *_of_vllm(facts["vllm"], facts["versions"]),
        *_of_kernels(facts["kernels"]),
        *_of_attention(facts["attention"]),
        *_of_compilers(facts["compilers"], facts["vllm"].get("platform")),
        *_of_caches(facts["caches"]),
        *_of_environment(facts["environment"]),
    ]
    return sorted(found, key=lambda finding: finding.severity != ERROR)


def _of_versions(versions: Mapping[str, Any]) -> Iterator[Finding]:
    if not is_supported("python", versions["python"]):
        yield Finding(ERROR, f"Python {versions['python']} is not supported", f"install Python {SUPPORTED['python']}")
    if versions["torch"] is None:
        yield Finding(ERROR, "torch is not installed in this environment", "install vLLM, which brings its own torch")
    if versions["vllm"] is None:
        yield Finding(
            ERROR,
            f"vLLM is not installed in this environment ({versions['executable']})",
            f"install vLLM {SUPPORTED['vllm']}, or run the doctor with the Python that runs vLLM",
        )
    elif not is_supported("vllm", versions["vllm"]):
        yield Finding(
            ERROR,
            f"vLLM {versions['vllm']} is not supported, so the plugin does not register",
            f"install vLLM {SUPPORTED['vllm']}, or another release of xquant-vllm",
        )
    for package, purpose in (
        ("transformers", "`xquant factorize --calibration` and `xquant eval` need it"),
        ("triton", "the kernels for GPUs were not tried with it"),
    ):
        version = versions[package]
        if version is not None and not is_supported(package, version):
            yield Finding(
                WARNING,
                f"{package} {version} is outside of {SUPPORTED[package]}: {purpose}",
                f"install {package} {SUPPORTED[package]}, if your vLLM allows it",
            )


def _of_vllm(vllm: Mapping[str, Any], versions: Mapping[str, Any]) -> Iterator[Finding]:
    if vllm["entry_point"]["found"] is None:
        yield Finding(
            ERROR,
            "vLLM cannot find the plugin: this package has no entry point in this environment",
            "install it with the Python that runs vLLM: pip install --no-build-isolation xquant-vllm",
        )
    elif not vllm["entry_point"]["allowed"]:
        yield Finding(
            ERROR,
            "vLLM does not load the plugin: VLLM_PLUGINS is set and does not name it",
            "add xquant to VLLM_PLUGINS, or unset it",
        )
    if versions["vllm"] is None:
        return
    if vllm["error"] is not None:
        yield Finding(
            ERROR,
            f"vLLM cannot be imported: {vllm['error']}",
            "repair or reinstall vLLM; python -c 'import vllm' shows the whole error",
        )
        return
    if vllm["platform"] not in (None, "cpu", "cuda"):
        what = f"the platform {vllm['platform']!r}" if vllm["platform"] else "no platform that it knows"
        yield Finding(
            ERROR,
            f"vLLM runs on {what}, for which this package has no kernels",
            "install a vLLM for CPUs, or for CUDA on a machine with a GPU",
        )
    missing = [name for name in BACKENDS if name not in (vllm["backends"] or ())]
    usable = is_supported("vllm", versions["vllm"]) and vllm["entry_point"]["found"] and vllm["entry_point"]["allowed"]
    if missing and usable:
        yield Finding(
            ERROR,
            f"vLLM has loaded its plugins, and does not know the backend {missing[0].lower()}"
            + (f" ({vllm['errors']['backends']})" if "backends" in vllm["errors"] else ""),
            "look for lines of xquant in vLLM's log at start-up, and report them",
        )


def _of_kernels(kernels: Mapping[str, Any]) -> Iterator[Finding]:
    errors = kernels["errors"]
    if "torch" in errors:
        yield Finding(ERROR, f"torch cannot be imported: {errors['torch']}", "reinstall the torch that vLLM needs")
        return
    if kernels["ended"] is not None:
        yield Finding(
            ERROR,
            f"the process that tries the kernels did not come to its end: {kernels['ended']}",
            "reinstall xquant-vllm on this machine, and report it if that does not help",
        )
    if "choice" in errors:
        yield Finding(ERROR, f"no kernels can be chosen: {errors['choice']}", "unset XQUANT_ATTENTION_KERNELS")
    choice = kernels["choice"] or {}
    if choice.get("kind") == "reference":
        text = choice["text"]
        problem, _, remedy = text.rpartition("; ") if "; " in text else (text, "", "unset XQUANT_ATTENTION_KERNELS")
        yield Finding(WARNING, problem, remedy)


def _of_attention(attention: Mapping[str, Any]) -> Iterator[Finding]:
    if attention["error"] is not None:
        yield Finding(
            ERROR,
            f"a tiny attention fails: {attention['error']}",
            "set XQUANT_ATTENTION_KERNELS=reference to serve without these kernels, and report it",
        )
    for result in attention["results"]:
        if not result["passed"]:
            yield Finding(
                ERROR,
                f"the kernels are wrong: {result['operation']} in {result['dtype']} is off by {result['error']}, at "
                f"most {result['bound']} is allowed",
                "set XQUANT_ATTENTION_KERNELS=reference to serve without these kernels, and report it",
            )


def _of_compilers(compilers: Mapping[str, Any], platform: str | None) -> Iterator[Finding]:
    needed = {"cpu": ("g++", "python_headers"), "cuda": ("cc",)}.get(platform or "", ())
    what = {"g++": "g++", "python_headers": "Python.h, of the package python3-dev,", "cc": "a C compiler"}
    for name in needed:
        if compilers[name]["command"] is None:
            instead = ", or serve with --enforce-eager" if platform == "cpu" else ""
            yield Finding(WARNING, f"{what[name]} is missing: {compilers[name]['needed_for']}", f"install it{instead}")


def _of_caches(caches: Mapping[str, Any]) -> Iterator[Finding]:
    factors = caches["factors"]
    if not factors["writable"]:
        where = factors["folder"] or "a home folder, of which there is none"
        yield Finding(
            WARNING,
            f"factors cannot be kept in {where}: they are computed at every start",
            "make the folder writable, or set XDG_CACHE_HOME",
        )
    compiled = caches["vllm_compiled"]
    if not compiled["writable"]:
        yield Finding(
            WARNING,
            f"vLLM cannot keep what it compiles in {compiled['folder'] or 'a home folder'}",
            "make the folder writable, set VLLM_CACHE_ROOT, or serve with --enforce-eager",
        )


def _of_environment(environment: Mapping[str, Any]) -> Iterator[Finding]:
    for name in environment["unread"]:
        problem, _, remedy = about_unread(name).rpartition(": ")
        yield Finding(WARNING, problem, remedy)
    asked = asked_by_variable(environment["variables"], tuple(BACKENDS))
    if asked is not None:
        problem, _, remedy = about_variable(asked).rpartition("; ")
        yield Finding(WARNING, problem, remedy)
