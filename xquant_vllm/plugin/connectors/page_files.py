"""Files of pages: the pages of one block in all layers of a KV cache group, what they belong to, and a checksum.

A file has a header of 100 bytes, and the layers' pages in their order:

    offset   0   8 bytes   name and version of this format
    offset   8  16 bytes   fingerprint of the engine (fingerprint.py)
    offset  24  32 bytes   key: all tokens up to the end of the block (keys.py)
    offset  56   4 bytes   KV cache group, little endian
    offset  60   8 bytes   bytes of pages, little endian
    offset  68  32 bytes   SHA-256 of the header up to here and of the pages

Files appear whole: they are written under another name first. What is not exactly such a file is never read as one.
"""

import contextlib
import hashlib
import os
import secrets
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAGIC = b"XQPAGES1"
SUFFIX, PART_SUFFIX = ".pages", ".part"
_WHAT = struct.Struct("<8s16s32sIQ")
_DIGEST_BYTES = 32
HEADER_BYTES = _WHAT.size + _DIGEST_BYTES


class PageFileError(Exception):
    """A file that cannot be used; the message says what is wrong with it, a verb first, without its name."""


class PageFolder:
    """The files of one rank of engines that write and read the same pages.

    Attributes:
        page_bytes: of every KV cache group, bytes of a block's pages in all of its layers.
    """

    def __init__(self, root: Path, fingerprint: bytes, page_bytes: Sequence[int]) -> None:
        """Nothing is made before it is needed.

        Args:
            root: the folder that engines share.
            fingerprint: ``[16]``, of this rank.
            page_bytes: see the attribute.
        """
        self.folder = root / fingerprint.hex()
        self.page_bytes = tuple(page_bytes)
        self._fingerprint = fingerprint

    def path(self, group: int, key: bytes) -> Path:
        """Where the pages of a block are."""
        name = key.hex()
        return self.folder / name[:2] / f"{name}-{group}{SUFFIX}"

    def holds(self, group: int, key: bytes) -> bool:
        """Whether there is a file of the right size; a folder, a link or a pipe is none."""
        try:
            found = os.lstat(self.path(group, key))
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == HEADER_BYTES + self.page_bytes[group]

    def write(self, group: int, key: bytes, pages: memoryview) -> int:
        """Write the pages of a block; who reads at that time finds all of them or none.

        Args:
            group: KV cache group.
            key: of the block.
            pages: its bytes.

        Returns:
            Bytes of the file.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        path = self.path(group, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / f"{os.getpid()}-{secrets.token_hex(6)}{PART_SUFFIX}"
        what = self._what(group, key)
        try:
            # Not a temporary file of Python's, which nobody else may read.
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with os.fdopen(handle, "wb") as file:
                file.write(what)
                file.write(_digest(what, pages))
                file.write(pages)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        return HEADER_BYTES + len(pages)

    def read(self, group: int, key: bytes) -> bytearray:
        """The pages of a block, proved to be those that were written for it.

        Raises:
            PageFileError: they are not.
        """
        size = HEADER_BYTES + self.page_bytes[group]
        content = _read(self.path(group, key), size)
        view, what = memoryview(content), self._what(group, key)
        found = bytes(view[: _WHAT.size])
        if found != what:
            raise PageFileError(_difference(found, what))
        if bytes(view[_WHAT.size : HEADER_BYTES]) != _digest(what, view[HEADER_BYTES:]):
            raise PageFileError("is corrupt: its checksum is wrong")
        view.release()
        del content[:HEADER_BYTES]
        return content

    def _what(self, group: int, key: bytes) -> bytes:
        return _WHAT.pack(MAGIC, self._fingerprint, key, group, self.page_bytes[group])


def _digest(what: bytes, pages: memoryview) -> bytes:
    digest = hashlib.sha256(what)
    digest.update(pages)
    return digest.digest()


def _read(path: Path, size: int) -> bytearray:
    """A file of so many bytes."""
    try:
        # Not through links, and a pipe must not make anyone wait.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise PageFileError("is no regular file")
            if found.st_size != size:
                raise PageFileError(f"has {found.st_size:,} bytes instead of {size:,}")
            with open(handle, "rb", buffering=0, closefd=False) as file:
                content = bytearray(size)
                if _fill(content, file) < size:
                    raise PageFileError("got shorter while it was read")
        finally:
            os.close(handle)
    except OSError as error:
        raise PageFileError(f"cannot be read ({error.strerror})") from None
    return content


def _fill(content: bytearray, file: Any) -> int:
    """Read into all of a buffer; bytes that were there."""
    view, done = memoryview(content), 0
    while done < len(content) and (count := file.readinto(view[done:])):
        done += count
    return done


def _difference(found: bytes, expected: bytes) -> str:
    """What is wrong with a header."""
    magic, fingerprint, key, *_ = zip(_WHAT.unpack(found), _WHAT.unpack(expected), strict=True)
    if magic[0] != magic[1]:
        return "is no file of pages"
    if fingerprint[0] != fingerprint[1]:
        return "has pages of other factors or settings"
    return "has the pages of other tokens" if key[0] != key[1] else "has other pages than its name says"
