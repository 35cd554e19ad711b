"""What is in the factor cache, and how entries are removed while servers use it.

Of files there is no lock. An entry gets its name when it is whole, and is not changed afterwards. Who has opened it
goes on reading what was removed; who comes later computes it again. Files that are still being written are left alone.
Folders of calibrated factors are entries, too (:mod:`xquant_vllm.scheme.calibration.kept`).
"""

import contextlib
import json
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xquant_vllm.scheme.calibration.kept import kept_folders, remove_kept
from xquant_vllm.scheme.factor_cache_folder import ABOUT, PART_SUFFIX, SUFFIX

# Seconds after which nobody writes to a part of an entry any more.
ABANDONED = 3600
_ENTRY = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")
_PART = re.compile(rf"\.[a-z0-9_]+{re.escape(PART_SUFFIX)}")
# Of what an entry says of itself, which has no more than some tensors and their checksums.
_LONGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class CacheEntry:
    """The factors of one layer on one rank, all that were calibrated of a model, or what is left of a killed process.

    Attributes:
        path: the file, or the folder of calibrated factors.
        size: its bytes.
        last_used: when it was read or written last, in seconds since 1970.
        about: ``model``, ``layer``, ``settings`` and ``created``, as it was noted; empty for an entry of an older
            release, and where it cannot be read.
        part: whether it is no entry, but left of one.
        calibrated: whether it is a folder.
    """

    path: Path
    size: int
    last_used: float
    about: dict[str, Any] = field(default_factory=dict)
    part: bool = False
    calibrated: bool = False

    @property
    def model(self) -> str | None:
        """What the user called the model that it was made for first; None where that was not noted."""
        model = self.about.get("model")
        return model if isinstance(model, str) else None

    def is_of(self, name: str) -> bool:
        """Whether a name is that of its model, or the end of its path."""
        return self.model is not None and (self.model == name or Path(self.model).name == name)


def cache_entries(folder: Path) -> list[CacheEntry]:
    """What the cache keeps in its folder, and nothing else that is there; none where there is no folder.

    Args:
        folder: see :func:`xquant_vllm.scheme.factor_cache_folder.cache_folder`.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            files = sorted(_entries(found), key=lambda entry: entry.path)
    except FileNotFoundError:
        return []
    now = time.time()
    kept = (CacheEntry(*of, calibrated=True) for of in kept_folders(folder))
    return [*files, *(entry for entry in kept if not (entry.part and now - entry.last_used < ABANDONED))]


def remove(entry: CacheEntry) -> bool:
    """Remove an entry, unless it was used after it was listed; whether it is gone by this call.

    A folder stays for some minutes after a server has chosen it, because the server has yet to read it.

    Raises:
        OSError: it cannot be removed.
    """
    if entry.calibrated:
        return remove_kept(entry.path, entry.last_used)
    try:
        found = entry.path.lstat()
        if found.st_mtime > entry.last_used or not stat.S_ISREG(found.st_mode):
            return False
        entry.path.unlink()
    except FileNotFoundError:
        return False
    return True


def _entries(found: Iterator[os.DirEntry[str]]) -> Iterator[CacheEntry]:
    for item in found:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            part = _PART.fullmatch(item.name) is not None
            if not (part or _ENTRY.fullmatch(item.name)) or not item.is_file(follow_symlinks=False):
                continue
            state, path = item.stat(follow_symlinks=False), Path(item.path)
            if part and time.time() - state.st_mtime < ABANDONED:
                continue
            about = {} if part else _about(path)
            yield CacheEntry(path, state.st_size, state.st_mtime, about, part)


def _about(path: Path) -> dict[str, Any]:
    """What an entry says of itself."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else {}
        about = json.loads(header["__metadata__"][ABOUT])
    except (OSError, ValueError, KeyError, TypeError, struct.error, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}
