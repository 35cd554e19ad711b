"""Makes the environment .venv with vLLM for CPU, this package and its tools: `make venv`.

Every step looks at what is there first, so a run after an interrupted one carries on, and one after a change of
pyproject.toml installs only the difference. Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from envsetup import packages, repair, system
from envsetup.console import SetupError, first_line_of_error, run_python, say, stop

PROJECT = Path(__file__).resolve().parent.parent
# Of what vLLM asks for on this Python; builds without isolation use it.
SETUPTOOLS = "setuptools==78.1.1"

CHECKS = (
    ("libnuma loads", "import ctypes; ctypes.CDLL('libnuma.so.1')"),
    ("transformers imports its models", "from transformers.models.llama import modeling_llama"),
    ("package metadata is readable", "import importlib.metadata as m; assert 'vllm' in m.packages_distributions()"),
    (
        "vLLM finds this CPU and its kernels",
        "import torch; from vllm.platforms import current_platform as p; assert p.is_cpu(), p;"
        "p.import_kernels(); torch.ops._C.silu_and_mul",
    ),
    (
        "vLLM finds the plug-in",
        "import importlib.metadata as m;"
        "assert any(e.name == 'xquant' for e in m.entry_points(group='vllm.general_plugins')), 'no entry point xquant'",
    ),
)


def make_environment(environment: Path) -> Path:
    """Create the virtual environment, or keep the one there if its pip runs; returns its Python."""
    python = environment / "bin" / "python"
    if python.exists():
        works = subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False)
        if works.returncode == 0:
            return python
        say(f"{environment} is damaged (its pip does not run); making it anew")
        shutil.rmtree(environment)
    say(f"making {environment} with Python {sys.version.split()[0]}")
    done = subprocess.run([sys.executable, "-m", "venv", str(environment)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"python -m venv {environment} failed: {(done.stdout + done.stderr).strip()}")
    return python


def site_packages_of(python: Path) -> Path:
    """Where the environment keeps its packages."""
    done = run_python(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    if done.returncode:
        raise SetupError(f"{python} does not run: {first_line_of_error(done.stderr)}; delete {python.parent.parent}")
    return Path(done.stdout.strip())


def check(python: Path) -> None:
    """Try what users will run; raise at the first that fails."""
    say("checking the environment")
    for what, code in CHECKS:
        done = run_python(python, code)
        if done.returncode:
            raise SetupError(f"check failed: {what}: {first_line_of_error(done.stderr)}")
    command = [str(python.parent / "vllm"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SetupError(f"check failed: {' '.join(command)}: {first_line_of_error(done.stderr)}")
    say(f"vllm {done.stdout.strip().splitlines()[-1]} is ready")


def set_up(environment: Path, wheel: Path | None) -> None:
    """All steps, in order. The stamp is written last: without it, the next run repairs.

    Args:
        environment: folder of the environment.
        wheel: folder with a wheel of this package to install; None for the sources, editable, with tests' tools.
    """
    stamp = environment / ".ready"
    finished_before = stamp.exists()
    system.check_python()
    python = make_environment(environment)
    site_packages = site_packages_of(python)
    stamp.unlink(missing_ok=True)
    if not finished_before:
        damaged = repair.forget_damaged(site_packages)
        if damaged:
            say(f"left half installed by an interrupted run, to be installed anew: {', '.join(damaged)}")
    system.provide_libnuma(environment, site_packages)
    pip = packages.Pip(python, environment / "pip.log")
    if packages.installed_version(python, "setuptools") != SETUPTOOLS.split("==")[1]:
        pip.install("--quiet", SETUPTOOLS)
    packages.install_vllm(pip, PROJECT, trust_installed=finished_before)
    packages.drop_misfits(pip, site_packages)
    packages.install_vllm_metadata(pip, PROJECT, site_packages)
    if wheel is None:
        packages.install_package(pip, PROJECT)
    else:
        packages.install_wheel(pip, wheel)
    packages.drop_misfits(pip, site_packages)
    check(python)
    system.advise_on_headers()
    stamp.touch()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--environment", type=Path, default=PROJECT / ".venv", help="folder (default: .venv)")
    parser.add_argument("--wheel", type=Path, help="install the wheel in this folder, without tools (docker/)")
    arguments = parser.parse_args()
    try:
        set_up(arguments.environment.absolute(), arguments.wheel)
    except SetupError as error:
        return stop(str(error))
    except KeyboardInterrupt:
        return stop("interrupted; run it again to carry on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
