"""What the machine must have, checked before anything is downloaded."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from .console import SetupError, say

LIBNUMA = "libnuma.so.1"


def check_python() -> None:
    """Refuse a Python that cannot make the environment."""
    if sys.version_info < (3, 10):  # noqa: UP036 - any Python may run this, not only one the package allows
        raise SetupError(
            f"Python {sys.version.split()[0]} ({sys.executable}) is too old, 3.10 is the oldest that vLLM runs on; "
            "name a newer one: make venv PYTHON=python3.11"
        )
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: Debian keeps that part in a package of its own; "
            "run as root: apt-get install python3-venv"
        )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def provide_libnuma(environment: Path, site_packages: Path) -> None:
    """Make sure that vLLM's CPU kernels find libnuma, which neither their wheel nor a plain Debian brings.

    Where the system lacks it, Debian's package is unpacked into the environment, which needs no root. A .pth file
    loads it whenever the environment's Python starts: the dynamic linker then takes it for the one vLLM asks for.
    """
    private = environment / "lib" / "native" / LIBNUMA
    if _loads(LIBNUMA) or (private.exists() and _loads(str(private))):
        return
    say(f"{LIBNUMA} is missing; unpacking Debian's libnuma1 into {environment.name}")
    advice = "run as root: apt-get update && apt-get install libnuma1"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SetupError(f"vLLM's CPU kernels need {LIBNUMA}, which this system lacks; install libnuma")
    with tempfile.TemporaryDirectory() as folder:
        fetched = subprocess.run(
            ["apt-get", "download", "libnuma1"], cwd=folder, capture_output=True, text=True, check=False
        )
        packages = list(Path(folder).glob("libnuma1_*.deb"))
        if fetched.returncode or not packages:
            said = (fetched.stderr.strip().splitlines() or ["no message"])[-1]
            raise SetupError(
                f"vLLM's CPU kernels need {LIBNUMA}, which this system lacks, and apt-get could not download it "
                f"({said}); {advice}"
            )
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), "unpacked"], cwd=folder, check=True)
        library = next(Path(folder, "unpacked").rglob(LIBNUMA), None)
        if library is None or not _loads(str(library)):
            raise SetupError(f"{packages[0].name} holds no {LIBNUMA} that loads here; {advice}")
        private.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, private)
    hook = f"import ctypes, os; os.path.exists({str(private)!r}) and ctypes.CDLL({str(private)!r})\n"
    (site_packages / "xquant_libnuma.pth").write_text(hook, encoding="utf-8")


def advise_on_headers() -> None:
    """Say that torch.compile will not work without Python's C headers; everything else does."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        say(
            f"note: {header} is missing, so vLLM cannot use torch.compile: serve with --enforce-eager "
            "(make demo does), or install it: apt-get install python3-dev"
        )
