"""Runs the steps of a Dockerfile in folders of this machine, without a container engine.

Every stage is a folder, its root; absolute paths in steps mean places below it. A step that cannot be run so,
because it is more than one program of this project, is refused: what the Dockerfiles do is what was run here.
"""

import io
import json
import os
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from dockerfile_parse import DockerfileParser

from tests.packaging.beside_vllm import OUTSIDE

ROOT = Path(__file__).resolve().parent.parent.parent
# Where programs of this project lie, in its sources and in the images.
_OUR_FOLDERS = ("docker", "tools", "xquant")
_KEPT = ("USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT")


class StepError(Exception):
    """A step is not one that can be run here, or it failed; the message has what it said."""


def copy_context(target: Path) -> Path:
    """What .dockerignore lets an image see: ``*``, then names that are let in, then patterns of files anywhere."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    if lines[0] != "*":
        raise StepError(".dockerignore must begin with *")
    names = [line.removeprefix("!") for line in lines if line.startswith("!")]
    patterns = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    if len(names) + len(patterns) + 1 != len(lines):
        raise StepError(".dockerignore has lines of another kind than *, !name and **/pattern")
    target.mkdir(parents=True)
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns(*patterns))
        elif not any(fnmatch(name, pattern) for pattern in patterns):
            shutil.copy(source, target / name)
    return target


class Stage:
    """A stage of an image: its files and what later steps and the container see."""

    def __init__(self, root: Path, image: str) -> None:
        self.root = root
        self.image = image
        self.folder = root
        # Images have a Python of their own on the path.
        path = f"{Path(sys.base_prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**OUTSIDE, "PATH": path}
        self.kept: dict[str, str] = {}
        (root / "etc").mkdir(parents=True)
        (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")

    def inherit(self, base: "Stage") -> None:
        """Begin with what another stage has."""
        shutil.copytree(base.root, self.root, symlinks=True, dirs_exist_ok=True)
        self.folder = self.at(str(Path("/") / base.folder.relative_to(base.root)))
        self.environment, self.kept, self.image = dict(base.environment), dict(base.kept), base.image

    def at(self, path: str) -> Path:
        """Where a path of the image lies; relative ones are in the working folder."""
        return self.root / path.lstrip("/") if path.startswith("/") else self.folder / path

    def run(self, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program as the image would: a file in it, or its Python with one."""
        script = arguments[1] if arguments[0] == "python3" else arguments[0]
        folders = self.at(script).relative_to(self.root).parts[:-1]
        if not self.at(script).is_file() or not folders or folders[-1] not in _OUR_FOLDERS:
            raise StepError(f"{shlex.join(arguments)}: no program of this project, so no test has run it")
        command = [str(self.at(text)) if text.startswith("/") else text for text in arguments]
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=600,
        )


class ImageBuild:
    """The steps of a Dockerfile, done one by one."""

    def __init__(self, dockerfile: Path, folder: Path, given: dict[str, Callable[[Stage], None]]) -> None:
        """Parse.

        Args:
            dockerfile: the file.
            folder: where its stages are made; is created.
            given: name of a base image (without its tag) or of a stage -> what to put into it before its first step,
                in place of what is downloaded.
        """
        folder.mkdir(parents=True)
        self.folder = folder
        self.given = given
        self.context = copy_context(folder / "context")
        parsed = DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes())).structure
        self.steps = [(step["instruction"], step["value"]) for step in parsed if step["instruction"] != "COMMENT"]
        self.arguments: dict[str, str] = {}
        self.stages: dict[str, Stage] = {}

    @property
    def final(self) -> Stage:
        """The last stage: the image."""
        return list(self.stages.values())[-1]

    def build(self, **variables: str) -> Stage:
        """Do all steps; returns the image.

        Args:
            variables: added to the environment of every program that a step runs.

        Raises:
            StepError: a step failed, or is none that can be run here.
        """
        for instruction, value in self.steps:
            if instruction == "ARG":
                name, _, default = value.partition("=")
                self.arguments[name] = default
            elif instruction == "FROM":
                self._from(string.Template(value).substitute(self.arguments))
            elif instruction == "COPY":
                self._copy(value.split())
            elif instruction == "ENV":
                self._env(value)
            elif instruction == "WORKDIR":
                self.final.folder = self.final.at(value)
                self.final.folder.mkdir(parents=True, exist_ok=True)
            elif instruction == "RUN":
                if set(value) & set("&;|<>`$()"):
                    raise StepError(f"RUN {value}: more than one program; make it a script that tests run")
                done = self.final.run(shlex.split(value), **variables)
                if done.returncode:
                    raise StepError(f"RUN {value} failed:\n{done.stdout}{done.stderr}")
            elif instruction in _KEPT:
                self.final.kept[instruction] = value
            else:
                raise StepError(f"{instruction} {value}: no test does such a step")
        return self.final

    def _from(self, value: str) -> None:
        image, _, name = value.partition(" AS ")
        name = name or "final"
        stage = Stage(self.folder / name, image)
        if image in self.stages:
            stage.inherit(self.stages[image])
        for key in (image.split(":")[0], name):
            if key in self.given:
                self.given[key](stage)
        self.stages[name] = stage

    def _copy(self, words: list[str]) -> None:
        other = self.stages[words.pop(0).removeprefix("--from=")] if words[0].startswith("--from=") else None
        *sources, target = words
        for source in sources:
            into = self.final.at(target)
            if other is not None:
                # Linked, so that programs which know where they lie find themselves there.
                into.parent.mkdir(parents=True, exist_ok=True)
                into.symlink_to(other.at(source))
            elif (self.context / source).is_dir():
                shutil.copytree(self.context / source, into, dirs_exist_ok=True)
            else:
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.context / source, into)

    def _env(self, value: str) -> None:
        for pair in shlex.split(value):
            name, _, text = pair.partition("=")
            parts = [str(self.final.at(part)) if part.startswith("/") else part for part in text.split(":")]
            self.final.environment[name] = string.Template(":".join(parts)).substitute(self.final.environment)

    def command_of(self, instruction: str) -> list[str]:
        """The command of ENTRYPOINT or HEALTHCHECK in the image."""
        return [str(text) for text in json.loads("[" + self.final.kept[instruction].partition("[")[2])]
