"""The blocks of one instance: which prefixes are kept and which are evicted, in the order in which vLLM does it.

vLLM (``vllm/v1/core/block_pool.py``) keeps free blocks in a queue. New tokens take blocks from its front; blocks that
hold a prefix are found again until that happens. When a request ends, its blocks go to the back, the last of them
first, so that the tail of a prefix is evicted before its beginning. Blocks in use are never evicted, and a block that
several requests use becomes free with the last one. Only whole blocks are found again. A request waits until there is
room for its whole prompt.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import count


class BlockCache:
    """Of one instance."""

    def __init__(self, blocks: int | None, block_size: int) -> None:
        """Start empty.

        Args:
            blocks: how many there are; None for any number.
            block_size: tokens of a block.
        """
        self._size = block_size
        # Blocks that hold nothing that could be found again.
        self._blank: float = float("inf") if blocks is None else blocks
        self._free: OrderedDict[Hashable, None] = OrderedDict()
        self._used: dict[Hashable, int] = {}
        self._fresh = count()

    def match(self, names: Sequence[Hashable], prompt: int) -> int:
        """How many leading blocks of a prompt are here; never all of it, since its last token is computed anyway."""
        used, free = self._used, self._free
        found = 0
        for name in names[: (prompt - 1) // self._size]:
            if name not in used and name not in free:
                break
            found += 1
        return found

    def admit(self, names: Sequence[Hashable], prompt: int) -> "Held | None":
        """Give a request its blocks.

        Args:
            names: of the whole blocks of its prompt.
            prompt: its tokens.

        Returns:
            What it holds, None if there is no room now.
        """
        used, free = self._used, self._free
        found = self.match(names, prompt)
        needed = -(-prompt // self._size) - found
        evictable = len(free) - sum(name in free for name in names[:found])
        if needed > self._blank + evictable:
            return None
        for name in names[:found]:
            if name in free:
                del free[name]
                used[name] = 1
            else:
                used[name] += 1
        self._take(needed)
        held = list(names[:found])
        nameless = needed - (len(names) - found)
        for name in names[found:]:
            if name in used:  # computed by two requests at the same time, or its beginning was evicted meanwhile
                nameless += 1
                continue
            if name in free:
                del free[name]
                self._blank += 1
            used[name] = 1
            held.append(name)
        return Held(tuple(held), nameless, prompt, found * self._size)

    def finish(self, held: "Held", output: int, answers: Sequence[Hashable] = ()) -> None:
        """Take a request's blocks back, those of its answer included, which it has filled since.

        Args:
            held: what :meth:`admit` has given it.
            output: tokens of its answer.
            answers: names of the whole blocks that the answer has filled, as far as they are known.
        """
        size = self._size
        total = held.prompt + output
        more = -(-total // size) - -(-held.prompt // size)
        more = int(min(more, self._blank + len(self._free)))
        self._take(more)
        filled = min(total // size - held.prompt // size, held.nameless + more)
        self._blank += held.nameless + more - filled
        # Without a name of the trace nobody finds them again; they take room all the same.
        names = [answers[at] if at < len(answers) else (self, next(self._fresh)) for at in range(filled)]
        for name in reversed(names):
            if name in self._used or name in self._free:
                self._blank += 1
            else:
                self._free[name] = None
        used = self._used
        for name in reversed(held.names):
            used[name] -= 1
            if not used[name]:
                del used[name]
                self._free[name] = None

    def _take(self, blocks: int) -> None:
        """Blocks from the front of the queue."""
        blank = min(blocks, self._blank)
        self._blank -= blank
        for _ in range(int(blocks - blank)):
            self._free.popitem(last=False)


class Held:
    """What a request holds while it runs."""

    __slots__ = ("hit", "nameless", "names", "prompt")

    def __init__(self, names: tuple[Hashable, ...], nameless: int, prompt: int, hit: int) -> None:
        """Of a request.

        Args:
            names: of its blocks that can be found again.
            nameless: its other blocks.
            prompt: tokens of its prompt.
            hit: tokens of it that were found.
        """
        self.names, self.nameless, self.prompt, self.hit = names, nameless, prompt, hit
