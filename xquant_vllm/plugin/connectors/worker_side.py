"""The connector beside vLLM's worker: moves pages between the cache and files."""

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from xquant_vllm.errors import cause_of
from xquant_vllm.plugin.connectors.folder_size import FolderSize
from xquant_vllm.plugin.connectors.groups import PageGroup
from xquant_vllm.plugin.connectors.page_files import PageFileError, PageFolder
from xquant_vllm.plugin.connectors.transfers import Page

logger = logging.getLogger("vllm.xquant_vllm")

# Blocks that are copied out of the cache at once.
_TOGETHER = 32


@dataclass
class Moved:
    """Sums since the start.

    Attributes:
        read_files: files read; ``read_bytes`` and ``read_seconds`` likewise, until the pages are in the cache.
        written_files: files written; ``written_bytes`` and ``written_seconds`` likewise, from the pages in the cache.
        bad_files: files that were there and could not be used.
    """

    read_files: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    written_files: int = 0
    written_bytes: int = 0
    written_seconds: float = 0.0
    bad_files: int = 0

    def add(self, **more: float) -> None:
        """Add to some of them."""
        for name, number in more.items():
            vars(self)[name] += number


class GroupPages:
    """The pages of one KV cache group in the cache, as bytes."""

    def __init__(self, group: PageGroup, caches: Mapping[str, torch.Tensor]) -> None:
        """Look at the layers' caches.

        Args:
            group: the group.
            caches: by layer ``[num_blocks, ...]``, whatever a page's shape and dtype are.
        """
        self._caches = [caches[layer] for layer in group.layers]
        self._bytes = [cache[0].numel() * cache.element_size() for cache in self._caches]

    @property
    def page_bytes(self) -> int:
        """Of a block in all layers."""
        return sum(self._bytes)

    def take(self, blocks: Sequence[int]) -> torch.Tensor:
        """Copies of pages, ``[blocks, page_bytes]`` uint8 on the CPU."""
        index = torch.tensor(blocks, dtype=torch.int64)
        parts = [cache[index.to(cache.device)] for cache in self._caches]
        return torch.cat([part.flatten(1).contiguous().view(torch.uint8).cpu() for part in parts], 1)

    def put(self, blocks: Sequence[int], pages: torch.Tensor) -> None:
        """Write pages, as :meth:`take` has given them."""
        index = torch.tensor(blocks, dtype=torch.int64)
        for cache, part in zip(self._caches, pages.split(self._bytes, 1), strict=True):
            shaped = part.contiguous().view(cache.dtype).view(len(blocks), *cache.shape[1:])
            cache[index.to(cache.device)] = shaped.to(cache.device)


class WorkerSide:
    """Moves what the scheduler's side asks for, in the step in which it asks.

    Attributes:
        moved: what was moved.
    """

    def __init__(self, groups: Sequence[GroupPages], folder: PageFolder, size: FolderSize) -> None:
        """Nothing is moved yet."""
        self._groups, self._folder, self._size = groups, folder, size
        self._complained = False
        self.moved = Moved()

    def load(self, loads: Mapping[str, Sequence[Page]]) -> set[str]:
        """Read pages into the cache.

        Args:
            loads: by request.

        Returns:
            Requests of which a file could not be used. Their blocks may hold anything.
        """
        return {request for request, pages in loads.items() if not self._load(pages)}

    def _load(self, pages: Sequence[Page]) -> bool:
        start = time.perf_counter()
        # All are proved before the first is in the cache.
        found: list[torch.Tensor] = []
        for page in pages:
            try:
                content = self._folder.read(page.group, page.key)
            except PageFileError as error:
                self._discard(page, error)
                return False
            found.append(torch.frombuffer(content, dtype=torch.uint8))
        for index, group in enumerate(self._groups):
            mine = [(page.block, content) for page, content in zip(pages, found, strict=True) if page.group == index]
            if mine:
                blocks, contents = zip(*mine, strict=True)
                group.put(blocks, torch.stack(contents))
        for page in pages:
            with contextlib.suppress(OSError):  # the time of its last use, by which files go
                os.utime(self._folder.path(page.group, page.key))
        seconds = time.perf_counter() - start
        self.moved.add(read_files=len(found), read_bytes=sum(map(len, found)), read_seconds=seconds)
        return True

    def _discard(self, page: Page, error: PageFileError) -> None:
        """A file is bad: say so, and remove it so that nobody finds it again."""
        path = self._folder.path(page.group, page.key)
        if not os.path.lexists(path):  # its time was up between two looks
            return
        self.moved.add(bad_files=1)
        logger.warning("xquant: tokens are computed that were to come from %s, because the file %s", path, error)
        with contextlib.suppress(OSError):
            path.unlink()

    def save(self, pages: Sequence[Page]) -> None:
        """Write pages to files, those that have none. What cannot be written is not there for others, no more."""
        start = time.perf_counter()
        for index, group in enumerate(self._groups):
            wanted = {page.key: page.block for page in pages if page.group == index}
            missing = [key for key in wanted if not self._folder.holds(index, key)]
            for first in range(0, len(missing), _TOGETHER):
                keys = missing[first : first + _TOGETHER]
                contents = group.take([wanted[key] for key in keys])
                for key, content in zip(keys, contents, strict=True):
                    self._write(index, key, content)
        self.moved.add(written_seconds=time.perf_counter() - start)

    def _write(self, group: int, key: bytes, content: torch.Tensor) -> None:
        try:
            written = self._folder.write(group, key, content.numpy().data)
        except OSError as error:
            if not self._complained:
                self._complained = True
                logger.warning(
                    "xquant: pages cannot be written to %s (%s); others will not find them. This is said once",
                    self._folder.folder,
                    cause_of(error),
                )
            return
        self.moved.add(written_files=1, written_bytes=written)
        self._size.add(written)

    def say(self) -> None:
        """Say in the log what was moved."""
        moved = self.moved
        if moved.read_files or moved.written_files or moved.bad_files:
            logger.info(
                "xquant: pages: %s files (%s bytes) written in %.2f s, %s (%s bytes) read in %.2f s, %s could not be "
                "used, in all",
                f"{moved.written_files:,}",
                f"{moved.written_bytes:,}",
                moved.written_seconds,
                f"{moved.read_files:,}",
                f"{moved.read_bytes:,}",
                moved.read_seconds,
                f"{moved.bad_files:,}",
            )
