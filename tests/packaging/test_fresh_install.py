"""``pip install 'xquant-vllm[cpu]'`` into an empty environment, and a served answer from it, outside of the checkout.

Minutes and two gigabytes: vLLM with its torch is downloaded. The wheel is built here, or is the one that the variable
``RELEASED_WHEEL`` names.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from envsetup.packages import TORCH_INDEX
from vllm_process import Progress, VllmServer, free_port

from tests.packaging.beside_vllm import OUTSIDE
from xquant_vllm import __version__

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(3600)]


class Fresh:
    """An environment outside of the checkout, and a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "environment" / "bin"
        self.variables = {
            **{name: text for name, text in OUTSIDE.items() if name != "VIRTUAL_ENV"},
            "PATH": f"{self.bin}{os.pathsep}/usr/local/bin:/usr/bin:/bin",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment."""
        done = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """With the kernels inside, as it is published."""
    if "RELEASED_WHEEL" in os.environ:
        return Path(os.environ["RELEASED_WHEEL"])
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, str(ROOT / "tools" / "release.py"), "--out", str(out)]
    done = subprocess.run(command, env=OUTSIDE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, wheel) -> Fresh:
    """The environment, as docs/install.md says."""
    fresh = Fresh(tmp_path_factory.mktemp("fresh"))
    subprocess.run([sys.executable, "-m", "venv", str(fresh.bin.parent)], check=True)
    install = ("pip", "install", "--quiet", f"{wheel}[cpu]")
    if fresh.run(*install, check=False).returncode:
        # Where the configured indexes have no torch for CPUs.
        fresh.run(*install, "--extra-index-url", TORCH_INDEX)
    return fresh


def test_it_is_installed_whole(fresh):
    assert fresh.run("xquant", "--version").stdout.strip() == __version__
    where = fresh.run("python", "-c", "import xquant_vllm; print(xquant_vllm.__file__)").stdout.strip()
    assert Path(where).is_relative_to(fresh.bin.parent)


@pytest.fixture(scope="module")
def ready(fresh) -> Fresh:
    """After `xquant setup-cpu`, and what it asks for."""
    done = fresh.run("xquant", "setup-cpu", check=False)
    if done.returncode:
        # Companions of torch from an index without builds for CPUs: it says which to remove.
        assert "text models do without: pip uninstall --yes " in done.stderr, done.stderr
        fresh.run(*done.stderr.strip().rpartition("without: ")[2].split())
        done = fresh.run("xquant", "setup-cpu")
    assert "vLLM for CPUs is ready" in done.stdout
    return fresh


def test_the_doctor_finds_nothing_wrong(ready):
    if "doctor" not in ready.run("xquant", "--help").stdout:
        pytest.skip("this version has no `xquant doctor`")
    ready.run("xquant", "doctor")


def test_it_serves_outside_of_the_checkout(ready, smollm2):
    arguments = [str(smollm2), "--attention-backend", "xquant", "--max-model-len", "512", "--enforce-eager",
                 "--kv-cache-memory-bytes", "67108864", "--served-model-name", "smollm2",
                 "--dtype", "float32", "--additional-config.xquant.bits", "8"]  # fmt: skip
    program = [str(ready.bin / "vllm"), "serve"]
    # VllmServer adds to this process's variables; `env -i` takes them away.
    given = [f"{name}={text}" for name, text in {**ready.variables, "HF_HUB_OFFLINE": "1"}.items()]
    program = ["env", "-C", str(ready.folder), "-i", *given, *program]
    with VllmServer(arguments, ready.folder / "server.log", free_port(), program=program) as server:
        server.wait(server.is_healthy, "it answered", 600, Progress("fresh environment"))
        question = {"role": "user", "content": "What is the capital of France?"}
        body = {"model": "smollm2", "messages": [question], "temperature": 0, "max_tokens": 24}
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
        assert server.find(r"xquant: attention runs on the C\+\+ kernels")
    assert "Paris" in said
