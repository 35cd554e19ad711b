"""Keeps the files of a folder below a number of bytes: those that were used longest ago go first."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from xquant_vllm.plugin.connectors.page_files import PART_SUFFIX, SUFFIX

# Of the limit, what is left when files have gone: so that not every file that comes makes another one go.
_LEFT = 0.9
# Seconds after which nobody writes to a part of a file any more.
_ABANDONED = 3600
_FINGERPRINT, _START = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{2}")


class FolderSize:
    """Counts what one process writes, and looks at the whole folder when that may be too much.

    Several processes may do so at the same time: what one removes, another finds gone.
    """

    def __init__(self, root: Path, limit: int) -> None:
        """Look at nothing yet.

        Args:
            root: the folder that engines share, with the files of all of them.
            limit: bytes; 0 for none.
        """
        self._root, self._limit = root, limit
        self._size: int | None = None

    def add(self, size: int) -> None:
        """A file of so many bytes was written."""
        if not self._limit:
            return
        if self._size is None:
            self._size = sum(found.st_size for _, found in self._files())
        else:
            self._size += size
        if self._size > self._limit:
            self._size = self._shrink()

    def _shrink(self) -> int:
        """Remove files; bytes of those that are left."""
        files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
        size = sum(found.st_size for _, found in files)
        for path, found in files:
            if size <= _LEFT * self._limit:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            size -= found.st_size
        return size

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Files of pages, and what processes that were killed have left of some. Whatever else is there stays."""
        for engine in _folders(self._root, _FINGERPRINT):
            for start in _folders(engine, _START):
                with contextlib.suppress(OSError), os.scandir(start) as entries:
                    for entry in entries:
                        with contextlib.suppress(OSError):
                            yield from _mine(entry)


def _folders(folder: str | Path, name: re.Pattern[str]) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if name.fullmatch(entry.name) and entry.is_dir()]
    except OSError:
        return []


def _mine(entry: os.DirEntry[str]) -> Iterator[tuple[str, os.stat_result]]:
    if not entry.is_file(follow_symlinks=False):
        return
    found = entry.stat(follow_symlinks=False)
    if entry.name.endswith(SUFFIX):
        yield entry.path, found
    elif entry.name.endswith(PART_SUFFIX) and time.time() - found.st_mtime > _ABANDONED:
        os.unlink(entry.path)
