"""The container of docker/kubernetes/cpu.yaml, as far as that goes without a container engine.

The image's entry point is started with its arguments and variables as its user, without capabilities, first with an
empty folder of factors, then with one that cannot be written, as a second replica may have it. Where that user cannot
read the tests' own Python, this one's is taken; without capabilities the rights of files bind root, too.
"""

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_process import Progress, VllmServer, free_port, vllm_command

from tests.deploy.manifests import ROOT, container, environment, pod

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]
NAME = "cpu.yaml"
# In place of what a machine of the cluster has.
SMALLER = {"--kv-cache-memory-bytes": "67108864", "--max-model-len": "512"}


class Node:
    """A folder that stands in for the root of containers; their processes are those of the manifest's user."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        for name in ("models", "cache/xquant_vllm", "home/vllm", "tmp"):
            (root / name).mkdir(parents=True)
        shutil.copytree(model, root / "models" / "MODEL")
        self.user: list[str] = []
        if os.getuid() == 0:
            self.user = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
            security = pod(NAME)["spec"]["securityContext"]
            user, group = security["runAsUser"], security["runAsGroup"]
            other = [*self.user, f"--reuid={user}", f"--regid={group}", "--clear-groups"]
            if _can_read_python(other):
                self.user = other
                for path in (root, *root.rglob("*")):
                    os.chown(path, user, group)
                for parent in root.parents[:3]:
                    parent.chmod(parent.stat().st_mode | 0o055)

    def _in_root(self, text: str) -> str:
        return str(self.root / text[1:]) if text.startswith(("/models", "/cache", "/home")) else text

    def start(self, log: Path) -> VllmServer:
        """A replica."""
        words = [self._in_root(word) for word in container(NAME)["args"]]
        words = [f"{name}={SMALLER.get(name, text)}" if text else name for name, _, text in
                 (word.partition("=") for word in words)]  # fmt: skip
        variables = {name: self._in_root(text) for name, text in environment(NAME).items() if name != "PORT"}
        variables |= {"TMPDIR": str(self.root / "tmp"), "OMP_NUM_THREADS": "1"}
        variables["PATH"] = f"{Path(vllm_command()).parent}{os.pathsep}{os.environ['PATH']}"
        program = [*self.user, str(ROOT / "docker" / "serve.sh")]
        return VllmServer([*words, "--enforce-eager"], log, free_port(), variables, program=program)


@pytest.fixture(scope="module")
def node(smollm2, tmp_path_factory) -> Node:
    """Where both replicas run."""
    return Node(tmp_path_factory.mktemp("node") / "root", smollm2)


def _can_read_python(user: list[str]) -> bool:
    """Whether another user can run what the entry point runs."""
    command = [*user, "sh", "-c", 'exec "$0" -c "import vllm"', sys.executable]
    return subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0


def _get(server: VllmServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(server.url + path, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


@pytest.fixture(scope="module")
def first(node, tmp_path_factory) -> Iterator[VllmServer]:
    """The replica that finds no factors, while it runs."""
    with node.start(tmp_path_factory.mktemp("first") / "server.log") as server:
        server.wait(server.is_healthy, "it answered", 600, Progress("first replica"))
        yield server


def test_probes_and_prometheus_get_answers(first):
    assert _get(first, container(NAME)["livenessProbe"]["httpGet"]["path"])[0] == 200
    status, text = _get(first, pod(NAME)["metadata"]["annotations"]["prometheus.io/path"])
    assert status == 200
    assert "vllm:num_requests_running" in text


def test_a_second_replica_only_reads_the_factors(first, node, tmp_path):
    assert first.find(r"factors computed in")
    factors = node.root / "cache" / "xquant_vllm"
    written = {path.name for path in factors.glob("*.safetensors")}
    assert len(written) == 30
    first.stop()
    factors.chmod(0o555)
    with node.start(tmp_path / "server.log") as second:
        second.wait(second.is_healthy, "it answered", 300, Progress("second replica"))
        assert second.find(r"factors cached, read in")
        assert not second.find(r"factors cannot be kept")
    factors.chmod(0o755)
    assert {path.name for path in factors.iterdir()} == written


def test_nothing_was_written_anywhere_else(first, node):
    """What the pod has no volume for is read-only there."""
    assert {path.name for path in node.root.iterdir()} == {"models", "cache", "home", "tmp"}
    assert first.find(r"xquant: attention runs on the C\+\+ kernels")
