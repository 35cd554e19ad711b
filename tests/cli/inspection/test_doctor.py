"""``xquant doctor``: this machine, and machines on which something is broken."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.cpu_kernels import has_kernels
from xquant_vllm.cli.inspection.doctor import in_words
from xquant_vllm.cli.main import main
from xquant_vllm.diagnosis import doctor
from xquant_vllm.diagnosis.child import Found
from xquant_vllm.diagnosis.kernel_probe import ask_kernels
from xquant_vllm.diagnosis.vllm_probe import ask_vllm

OBJECT = {
    *("schema", "can_serve", "problems", "versions", "supported", "processor", "gpus", "vllm", "kernels", "attention"),
    *("compilers", "caches", "environment"),
}
SECRET = "hunter2"


def run(*options, **environment):
    command = [sys.executable, "-m", "xquant_vllm.cli", "doctor", *options]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What the doctor says of this machine, in an environment with secrets."""
    place = str(tmp_path_factory.mktemp("cache"))
    done = run("--json", HF_TOKEN=SECRET, XQUANT_BITS=SECRET, OPENAI_API_KEY=SECRET, XDG_CACHE_HOME=place)
    return done, json.loads(done.stdout)


def test_this_machine_can_serve(here):
    done, facts = here
    assert facts.keys() == OBJECT
    assert facts["can_serve"]
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert facts["vllm"]["backends"] == ["XQUANT", "KIVI"]
    assert facts["vllm"]["platform"] == "cpu"
    assert facts["attention"]["error"] is None
    assert [result["passed"] for result in facts["attention"]["results"]] == [True] * 5
    assert [problem["problem"] for problem in facts["problems"] if "XQUANT_BITS" in problem["problem"]]
    used = [row["name"] for row in facts["kernels"]["table"] if row["used"]]
    assert len(used) == 1
    if has_kernels():
        assert used[0].startswith("C++ for ")


def test_it_has_no_secrets(here):
    done, _ = here
    assert SECRET not in done.stdout + done.stderr


def test_looking_leaves_nothing_behind_in_the_factor_cache(here):
    _, facts = here
    assert not facts["caches"]["factors"]["exists"]
    assert not os.path.exists(facts["caches"]["factors"]["folder"])


def test_the_words(here):
    _, facts = here
    text = "\n".join(in_words(facts))
    for part in ("versions", "plugin", "machine", "kernels (* is used)", "compilers", "caches", "environment"):
        assert f"{part}\n" in text
    assert re.search(r"^  decode, float32: error \d\.\de-\d\d, at most 0\.005: ok$", text, re.M)
    assert "warning: the environment variable XQUANT_BITS has no effect" in text
    assert text.endswith("This machine can serve: vllm serve MODEL --attention-backend xquant")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libnuma.so.1: cannot open shared object file')", "libnuma.so.1: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import sys; sys.exit('no license')", "SystemExit: no license"),
        ("import no_such_module_of_vllm", "No module named 'no_such_module_of_vllm'"),
    ],
)
def test_a_broken_vllm(tmp_path, monkeypatch, code, said):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(code)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + (f":{before}" if before else ""))
    found = doctor._vllm(ask_vllm())
    assert said in found["error"]


@pytest.fixture
def installed(monkeypatch, here):
    """The command on a machine like this one, where some packages have other versions, or none."""
    _, facts = here
    vllm = Found({"version": facts["versions"]["vllm"], "platform": "cpu", "backends": ["XQUANT", "KIVI"]}, {}, None)
    attention = facts["attention"]["results"]
    kernels = Found({"choice": facts["kernels"]["choice"], "attention": attention, "gpus": []}, {}, None)
    monkeypatch.setattr(doctor, "ask_vllm", lambda: vllm)
    monkeypatch.setattr(doctor, "ask_kernels", lambda _: kernels)

    def installed(**versions):
        monkeypatch.setattr(doctor, "installed_versions", lambda: {**facts["versions"], **versions})

    return installed


def test_without_vllm(installed, capsys):
    installed(vllm=None, vllm_distribution=None)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "  vllm is not installed (supported: >=0.32,<0.34)" in text
    assert "error: vLLM is not installed in this environment" in text
    assert "  what to do: install vLLM >=0.32,<0.34, or run the doctor with the Python that runs vLLM" in text
    assert text.endswith("This machine cannot serve with xquant yet: see the errors above.\n")


def test_without_torch_and_vllm(installed, capsys):
    installed(torch=None, vllm=None, vllm_distribution=None)
    assert main(["doctor", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    errors = [problem["problem"].split(" is not")[0] for problem in problems if problem["severity"] == "error"]
    assert errors == ["torch", "vLLM"]


def test_without_home_and_compilers(installed, capsys, monkeypatch, tmp_path):
    installed()
    for name in ("HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "no folder, because there is no home" in text
    assert "warning: factors cannot be kept in a home folder, of which there is none" in text
    assert "warning: g++ is missing" in text


def test_the_doctor_itself_imports_neither_torch_nor_vllm():
    code = (
        "import sys; import xquant_vllm.cli.inspection.doctor; "
        "print({'torch', 'vllm', 'triton', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("kernels", "said"), [("reference", None), ("nonsense", "XQUANT_ATTENTION_KERNELS=nonsense is unknown")]
)
def test_kernels_that_were_asked_for(monkeypatch, kernels, said):
    monkeypatch.setenv("XQUANT_ATTENTION_KERNELS", kernels)
    found = ask_kernels("cpu")
    if said is None:
        assert found.sections["choice"]["kind"] == "reference"
        assert all(result["passed"] for result in found.sections["attention"])
    else:
        assert said in found.errors["choice"]
        assert "attention" not in found.sections
