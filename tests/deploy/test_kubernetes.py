"""The manifests of docker/kubernetes: what Kubernetes takes, and what the server in them needs.

No cluster runs them. ``test_kubernetes_start.py`` starts what the container would.
"""

import re
import subprocess
import sys

import kubernetes_validate
import pytest

from tests.deploy.manifests import FOLDER, ROOT, SERVING, container, documents, environment, kind, mounts, pod
from tests.docs.commands import check_serve
from xquant_vllm.scheme.factor_cache_folder import cache_folder

FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
# The oldest and the newest Kubernetes whose schemas the validator has, of those with all that is used here.
VERSIONS = ("1.27", kubernetes_validate.latest_version().rsplit(".", 1)[0])
# Seconds: a large model from a slow disk, factorized and compiled.
LONGEST_START = 20 * 60

serving = pytest.mark.parametrize("name", SERVING)


def test_these_are_the_files():
    assert set(FILES) == {*SERVING, "storage.yaml"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_follows_the_schemas_of_kubernetes(name, version):
    for document in documents(name):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_misspelt_field_is_refused():
    document = kind("cpu.yaml", "Deployment")
    document["spec"]["template"]["spec"]["containers"][0]["startUpProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


@serving
def test_the_probes_ask_the_server_for_its_health(name):
    used = container(name)
    (port,) = used["ports"]
    assert str(port["containerPort"]) == environment(name)["PORT"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert used[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    start = used["startupProbe"]
    patience = start["periodSeconds"] * start["failureThreshold"]
    assert patience >= LONGEST_START
    assert kind(name, "Deployment")["spec"]["progressDeadlineSeconds"] > patience


@serving
def test_the_service_and_the_budget_find_the_pods(name):
    labels = pod(name)["metadata"]["labels"]
    service, budget = kind(name, "Service")["spec"], kind(name, "PodDisruptionBudget")["spec"]
    assert service["selector"].items() <= labels.items()
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    assert kind(name, "Deployment")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert {port["targetPort"] for port in service["ports"]} == {container(name)["ports"][0]["name"]}


@serving
def test_prometheus_is_told_where_the_metrics_are(name):
    annotations = pod(name)["metadata"]["annotations"]
    assert annotations == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": environment(name)["PORT"],
        "prometheus.io/path": "/metrics",
    }


@serving
def test_every_mount_has_its_volume_and_every_claim_its_storage(name):
    volumes = {volume["name"]: volume for volume in pod(name)["spec"]["volumes"]}
    assert {mount["name"] for mount in mounts(name).values()} == set(volumes)
    claims = {document["metadata"]["name"] for document in documents("storage.yaml")}
    used = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
    assert used == claims


@serving
def test_factors_are_kept_on_the_storage_that_replicas_share(name, monkeypatch):
    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, environment(name)[variable])
    mount = mounts(name)[str(cache_folder())]
    assert mount["name"] == "factors"
    assert not mount.get("readOnly", False)


@serving
def test_what_the_server_writes_is_not_on_the_read_only_root(name):
    assert container(name)["securityContext"]["readOnlyRootFilesystem"]
    written = [environment(name)["HOME"], environment(name)["XDG_CACHE_HOME"], "/tmp", "/dev/shm"]
    assert [path for path in written if mounts(name).get(path, {"readOnly": True}).get("readOnly")] == []


@serving
def test_pods_are_allowed_where_the_restricted_standard_is_enforced(name):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    spec, own = pod(name)["spec"], container(name)["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost")
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    kinds = {key for volume in spec["volumes"] for key in volume if key != "name"}
    assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}


@serving
def test_the_user_is_that_of_the_image(name):
    security = pod(name)["spec"]["securityContext"]
    dockerfile = {"cpu.yaml": "Dockerfile.cpu", "gpu.yaml": "Dockerfile"}[name]
    (user,) = re.findall(r"^USER (\S+)$", (ROOT / "docker" / dockerfile).read_text(), re.M)
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert container(name)["image"] in (ROOT / "docs" / "install.md").read_text()


@serving
def test_vllm_takes_the_arguments(name):
    used = container(name)
    assert "command" not in used, "the entry point of the image selects the backend"
    check_serve(["serve", *used["args"], "--attention-backend", "xquant"])


@serving
def test_a_replica_may_finish_what_it_has_begun(name):
    """Sleep before the signal, requests behind it, and some time to end."""
    (drain,) = (int(word.partition("=")[2]) for word in container(name)["args"] if "shutdown-timeout" in word)
    (sleep,) = (int(word) for word in container(name)["lifecycle"]["preStop"]["exec"]["command"] if word.isdigit())
    assert pod(name)["spec"]["terminationGracePeriodSeconds"] >= sleep + drain + 30


def test_cores_are_threads():
    """Whatever the limit is set to."""
    variables = {entry["name"]: entry for entry in container("cpu.yaml")["env"]}
    assert variables["OMP_NUM_THREADS"]["valueFrom"]["resourceFieldRef"]["resource"] == "limits.cpu"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"]["value"] == "nobind"
    resources = container("cpu.yaml")["resources"]
    assert resources["requests"] == resources["limits"]


def test_the_memory_holds_the_cache():
    limits = container("cpu.yaml")["resources"]["limits"]
    (cache,) = (int(w.partition("=")[2]) for w in container("cpu.yaml")["args"] if "kv-cache-memory-bytes" in w)
    assert limits["memory"].endswith("Gi")
    assert cache <= int(limits["memory"].removesuffix("Gi")) * 2**30 / 2


@serving
def test_services_do_not_set_variables_of_the_server(name):
    """vLLM reads VLLM_PORT, this package variables with XQUANT_."""
    assert pod(name)["spec"]["enableServiceLinks"] is False


def test_both_files_are_alike_but_for_the_device():
    def rest(name: str) -> dict:
        used = {
            key: value for key, value in container(name).items() if key not in ("image", "args", "env", "resources")
        }
        return {**used, "volumes": pod(name)["spec"]["volumes"]}

    assert rest("cpu.yaml") == rest("gpu.yaml")
    assert environment("gpu.yaml").items() <= environment("cpu.yaml").items()
    assert container("gpu.yaml")["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("name", FILES)
def test_the_validators_command_takes_the_file(name):
    """As docs/deploy.md has it."""
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", str(FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
