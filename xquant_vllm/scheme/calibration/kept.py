"""What a folder of kept factors says of itself, and how it is removed while servers start. Imports no torch."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT_ROOM, ABOUT_FILE = "calibrated", "about.json"
# Seconds after which a server that has chosen a folder has read it.
READ_BY_THEN = 600
_FOLDER = re.compile(r"[0-9a-f]{32}")
_WORK = re.compile(r"\.[0-9a-f]{32}\.(work|removed)")


def write_about(folder: Path, model: str, settings: dict[str, Any]) -> None:
    """Note what a folder is of.

    Args:
        folder: of kept factors, not yet under its name.
        model: what the user called it, or its folder.
        settings: that decide what is in it.
    """
    about = {"model": model, "settings": settings, "created": time.time()}
    (folder / ABOUT_FILE).write_text(json.dumps(about))


def touch(folder: Path) -> None:
    """Note that a server has chosen a folder, which is then not removed while it reads it."""
    with contextlib.suppress(OSError):  # a folder that others keep, and that this user may only read
        os.utime(folder / ABOUT_FILE)


def kept_folders(root: Path) -> Iterator[tuple[Path, int, float, dict[str, Any], bool]]:
    """Folders of the cache, and what killed processes have left of some.

    Args:
        root: the factor cache.

    Yields:
        Path, bytes, when it was used last (seconds since 1970), what it says of itself, and whether it is a part.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted((root / KEPT_ROOM).iterdir()):
            part = _WORK.fullmatch(path.name) is not None
            if not (part or _FOLDER.fullmatch(path.name)) or path.is_symlink() or not path.is_dir():
                continue
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                yield path, *_size_and_use(path), {} if part else _about(path), part


def remove_kept(folder: Path, last_used: float) -> bool:
    """Remove a folder, unless somebody calibrates or reads it, or has used it since; whether it is gone by this call.

    Raises:
        OSError: it cannot be removed.
    """
    name = folder.name.strip(".").partition(".")[0]
    with (folder.parent / f".{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            _, used = _size_and_use(folder)
        except FileNotFoundError:
            return False
        if used > last_used or time.time() - used < READ_BY_THEN:
            return False
        # Under another name first: a server never finds half of a folder.
        removed = folder.with_name(f".{name}.removed")
        if folder != removed:
            shutil.rmtree(removed, ignore_errors=True)
            folder.rename(removed)
        shutil.rmtree(removed)
    return True


def _size_and_use(folder: Path) -> tuple[int, float]:
    """Bytes of a folder, and when it was used last.

    Raises:
        FileNotFoundError: it is gone, or a part of it.
    """
    states = [file.lstat() for file in folder.rglob("*")]
    used = max((state.st_mtime for state in states), default=folder.lstat().st_mtime)
    return sum(state.st_size for state in states), used


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}
