"""Whether a place can be written to, found out before hours are spent on what is to be written there."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xquant_vllm.errors import RefusedError


def check_file(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written. Nothing is left behind.

    Args:
        option: what names it, for the error.
        path: the file; folders above it may be missing. None where the option is not given.

    Raises:
        RefusedError: it names the option, the path, why, and what to name instead.
    """
    if path is None:
        return
    if path.is_dir():
        raise RefusedError(f"xquant: {option} {path} is a folder; name a file, for example {path / 'result.json'}")
    # A rename would put a file into the place of a device.
    if path.exists() and not path.is_file():
        raise RefusedError(f"xquant: {option} {path} is no ordinary file; name one that may be replaced")
    _check(option, path, path, "file")


def check_folder(option: str, path: Path | None) -> None:
    """Refuse a folder in which no file could be written. Nothing is left behind.

    Args:
        option: what names it.
        path: the folder; it and folders above it may be missing. None where the option is not given.

    Raises:
        RefusedError: likewise.
    """
    if path is not None:
        _check(option, path, path / "any", "folder")


def check_new_folder(option: str, path: Path) -> None:
    """Refuse a folder that could not be made. Nothing is left behind.

    Args:
        option: what names it.
        path: the folder; folders above it may be missing.

    Raises:
        RefusedError: likewise.
    """
    _check(option, path, path, "folder")


@contextlib.contextmanager
def missing_parents(path: Path) -> Iterator[None]:
    """Make the folders above a path; those that were made are removed again if the block fails and they are empty."""
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _check(option: str, shown: Path, made: Path, kind: str) -> None:
    """Try to make something beside what will be made, or in the nearest folder above that is there."""
    beside = made.absolute().parent
    above = beside
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise RefusedError(f"xquant: {option} {shown} cannot be written: {above} is no folder; name another {kind}")
    try:
        # With the name that is written first, where its folder is there: names can be too long, too.
        name = made.absolute().name if above == beside else "xquant"
        os.rmdir(tempfile.mkdtemp(prefix=f".{name}.", suffix=".new", dir=above))
    except OSError as error:
        raise RefusedError(
            f"xquant: {option} {shown} cannot be written: {error.strerror or error} ({above}); name another {kind}"
        ) from None
