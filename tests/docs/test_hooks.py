""".pre-commit-config.yaml runs what `make lint` runs."""

import re
import shlex
import subprocess

import yaml

from tests.docs.pages import ROOT


def _of_make() -> list[str]:
    """Commands of `make lint`, without what prepares the environment."""
    done = subprocess.run(["make", "--dry-run", "lint"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if re.match(r"\.venv/bin/(?!python)", line)]


def _of_hooks() -> list[str]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    commands = []
    for repository in config["repos"]:
        assert repository["repo"] == "local", "hooks of other repositories have versions of their own"
        for hook in repository["hooks"]:
            assert {"id", "name", "entry", "language", "files"} <= hook.keys()
            assert (hook["language"], hook["pass_filenames"]) == ("system", False)
            re.compile(hook["files"])
            words = shlex.split(hook["entry"])
            commands.append(words[2] if words[:2] == ["bash", "-c"] else hook["entry"])
    return commands


def test_the_hooks_are_the_linters_of_make():
    assert _of_hooks() == _of_make()


def test_every_linter_is_installed_with_the_tests():
    tools = {command.split()[0] for command in _of_hooks()}
    assert {tool for tool in tools if not (ROOT / tool).is_file()} == set()
