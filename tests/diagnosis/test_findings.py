"""From facts to what is wrong: each fault by itself, in the facts of a machine where all is well."""

import copy

import pytest

from xquant_vllm.diagnosis.findings import ERROR, WARNING, findings

FOLDER = {"folder": "/c", "exists": True, "writable": True, "files": 0, "bytes": 0}
COMPILER = {"command": "x", "version": "1", "needed_for": "something"}
WELL = {
    "versions": {
        "python": "3.11.2",
        "torch": "2.13.0",
        "vllm": "0.32.0",
        "triton": "3.7.0",
        "transformers": "4.57",
        "executable": "/bin/python",
    },
    "vllm": {
        "version": "0.32.0",
        "platform": "cpu",
        "entry_point": {"found": "x:register", "allowed": True},
        "backends": ["XQUANT", "KIVI"],
        "error": None,
        "errors": {},
    },
    "kernels": {"choice": {"kind": "cpp", "text": "attention runs"}, "errors": {}, "ended": None},
    "attention": {"results": [], "error": None},
    "compilers": dict.fromkeys(("g++", "python_headers", "cc"), COMPILER),
    "caches": {"factors": FOLDER, "vllm_compiled": FOLDER, "triton": FOLDER},
    "environment": {"variables": {}, "unread": []},
}


def ill(*path, value):
    facts = copy.deepcopy(WELL)
    place = facts
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return facts


def test_where_all_is_well_nothing_is_said():
    assert findings(WELL) == []


NOTHING = {"folder": None, "exists": False, "writable": False, "files": 0, "bytes": 0}
WRONG = [{"operation": "decode", "dtype": "float32", "error": None, "bound": 0.005, "passed": False}]
SLOW = {
    "kind": "reference",
    "text": "attention runs on the PyTorch reference, slower, because these cannot be loaded (x; y); install g++ and "
    "reinstall xquant-vllm",
}


@pytest.mark.parametrize(
    ("path", "value", "severity", "problem", "remedy"),
    [
        (("versions", "python"), "3.9.1", ERROR, "Python 3.9.1 is not supported", "install Python >=3.10"),
        (("versions", "torch"), None, ERROR, "torch is not installed", "install vLLM"),
        (
            ("versions", "vllm"),
            None,
            ERROR,
            "vLLM is not installed in this environment (/bin/python)",
            "install vLLM >=",
        ),
        (("versions", "vllm"), "0.40", ERROR, "vLLM 0.40 is not supported", "install vLLM >=0.32,<0.34"),
        (("versions", "transformers"), "4.40", WARNING, "transformers 4.40 is outside", "install transformers >=4.56"),
        (("versions", "triton"), "4.0", WARNING, "triton 4.0 is outside", "install triton"),
        (
            ("vllm", "error"),
            "ImportError: libcudart.so",
            ERROR,
            "cannot be imported: ImportError: libcudart",
            "reinstall",
        ),
        (("vllm", "entry_point", "found"), None, ERROR, "vLLM cannot find the plugin", "pip install"),
        (("vllm", "entry_point", "allowed"), False, ERROR, "VLLM_PLUGINS is set and does not name", "add xquant to"),
        (("vllm", "platform"), "xpu", ERROR, "vLLM runs on the platform 'xpu'", "install a vLLM for CPUs"),
        (("vllm", "platform"), "", ERROR, "vLLM runs on no platform that it knows", "install a vLLM for CPUs"),
        (("vllm", "backends"), ["XQUANT"], ERROR, "does not know the backend kivi", "report"),
        (("kernels", "ended"), "ended by SIGILL", ERROR, "did not come to its end: ended by SIGILL", "reinstall"),
        (
            ("kernels", "errors"),
            {"torch": "ImportError: x"},
            ERROR,
            "torch cannot be imported: ImportError",
            "reinstall",
        ),
        (("kernels", "errors"), {"choice": "ValueError: x"}, ERROR, "no kernels can be chosen: ValueError: x", "unset"),
        (("kernels", "choice"), SLOW, WARNING, "because these cannot be loaded (x; y)", "install g++ and reinstall"),
        (("attention", "error"), "ValueError: x", ERROR, "a tiny attention fails: ValueError: x", "reference"),
        (
            ("attention", "results"),
            WRONG,
            ERROR,
            "the kernels are wrong: decode in float32 is off by None",
            "reference",
        ),
        (("compilers", "g++"), {**COMPILER, "command": None}, WARNING, "g++ is missing: something", "--enforce-eager"),
        (
            ("compilers", "python_headers"),
            {**COMPILER, "command": None},
            WARNING,
            "Python.h, of the",
            "--enforce-eager",
        ),
        (("caches", "factors"), NOTHING, WARNING, "factors cannot be kept in a home folder", "set XDG_CACHE_HOME"),
        (("caches", "vllm_compiled"), NOTHING, WARNING, "vLLM cannot keep what it compiles", "set VLLM_CACHE_ROOT"),
        (
            ("environment", "unread"),
            ["XQUANT_BITS"],
            WARNING,
            "XQUANT_BITS has no effect",
            "--additional-config; unset",
        ),
        (
            ("environment", "variables"),
            {"VLLM_ATTENTION_BACKEND": "XQUANT"},
            WARNING,
            "VLLM_ATTENTION_BACKEND=XQUANT has no effect",
            "set --attention-backend xquant",
        ),
    ],
)
def test_a_fault_is_named_with_what_to_do(path, value, severity, problem, remedy):
    (found,) = findings(ill(*path, value=value))
    assert found.severity == severity
    assert problem in found.problem
    assert remedy in found.remedy


@pytest.mark.parametrize("name", ["g++", "cc"])
def test_a_compiler_that_is_not_needed_is_not_missed(name):
    facts = ill("compilers", name, value={**COMPILER, "command": None})
    facts["vllm"]["platform"] = "cuda" if name == "g++" else "cpu"
    assert findings(facts) == []


def test_errors_come_first():
    facts = ill("environment", "unread", value=["XQUANT_BITS"])
    facts["vllm"]["error"] = "ImportError: x"
    assert [found.severity for found in findings(facts)] == [ERROR, WARNING]
