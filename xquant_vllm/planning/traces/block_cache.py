"""The blocks of one instance: which prefixes are kept and which are evicted, in the order in which vLLM does it.

vLLM (``vllm/v1/core/block_pool.py``) keeps free blocks in a queue. New tokens take blocks from its front; blocks that
hold a prefix are found again until that happens. When a request ends, its blocks go to the back, the last of them
first, so that the tail of a prefix is evicted before its beginning. Blocks in use are never evicted, and a block that
several requests use becomes free with the last one. Only whole blocks are found again, and never the whole of a prompt:
if all of it is there, its last block is computed once more, and is there twice. A request waits until there is room for
its prompt. A test compares this with vLLM's own manager of blocks, request by request.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class Held:
    """What a request holds while it runs.

    Attributes:
        blocks: numbers of its blocks that can be found again, in order.
        nameless: how many others it has.
        prompt: tokens of its prompt.
        hit: tokens of it that were found.
    """

    blocks: tuple[int, ...]
    nameless: int
    prompt: int
    hit: int


class BlockCache:
    """Of one instance."""

    def __init__(self, blocks: int | None, block_size: int) -> None:
        """Start empty.

        Args:
            blocks: how many there are; None for any number.
            block_size: tokens of a block.
        """
        self._size = block_size
        # Blocks that hold nothing that could be found again. vLLM takes them first.
        self._blank: float = float("inf") if blocks is None else blocks
        # All others have numbers: the free ones in the order of their eviction, those in use with their users.
        self._numbers = count()
        self._free: OrderedDict[int, None] = OrderedDict()
        self._users: dict[int, int] = {}
        self._names: dict[int, Hashable] = {}
        self._by_name: dict[Hashable, list[int]] = {}

    def match(self, names: Sequence[Hashable], prompt: int) -> int:
        """How many leading blocks of a prompt are here; never all of it, since its last token is computed anyway."""
        found = 0
        for name in names[: (prompt - 1) // self._size]:
            if name not in self._by_name:
                break
            found += 1
        return found

    def admit(self, names: Sequence[Hashable], prompt: int) -> Held | None:
        """Give a request its blocks.

        Args:
            names: of the whole blocks of its prompt.
            prompt: its tokens.

        Returns:
            What it holds, None if there is no room now.
        """
        free, users = self._free, self._users
        found = [self._by_name[name][0] for name in names[: self.match(names, prompt)]]
        needed = -(-prompt // self._size) - len(found)
        if needed > self._blank + len(free) - sum(number in free for number in found):
            return None
        for number in found:
            free.pop(number, None)
            users[number] = users.get(number, 0) + 1
        self._take(needed)
        new = [self._name(name) for name in names[len(found) :]]
        users.update(dict.fromkeys(new, 1))
        return Held((*found, *new), needed - len(new), prompt, len(found) * self._size)

    def finish(self, held: Held, output: int, answers: Sequence[Hashable] = ()) -> None:
        """Take a request's blocks back, those of its answer included, which it has filled since.

        Args:
            held: what :meth:`admit` has given it.
            output: tokens of its answer.
            answers: names of the whole blocks that the answer has filled, as far as they are known.
        """
        size = self._size
        total = held.prompt + output
        more = int(min(-(-total // size) - -(-held.prompt // size), self._blank + len(self._free)))
        self._take(more)
        filled = min(total // size - held.prompt // size, held.nameless + more)
        self._blank += held.nameless + more - filled
        # Without a name of the trace nobody finds them again; they take room all the same.
        names = [answers[at] if at < len(answers) else (self, next(self._numbers)) for at in range(filled)]
        for number in reversed([self._name(name) for name in names]):
            self._free[number] = None
        users = self._users
        for number in reversed(held.blocks):
            users[number] -= 1
            if not users[number]:
                del users[number]
                self._free[number] = None

    def _name(self, name: Hashable) -> int:
        """A block that can be found by a name; others may have the same."""
        number = next(self._numbers)
        self._names[number] = name
        self._by_name.setdefault(name, []).append(number)
        return number

    def _take(self, blocks: int) -> None:
        """Blocks from the front of the queue."""
        blank = min(blocks, self._blank)
        self._blank -= blank
        for _ in range(int(blocks - blank)):
            number, _ = self._free.popitem(last=False)
            name = self._names.pop(number)
            alike = self._by_name[name]
            alike.remove(number)
            if not alike:
                del self._by_name[name]
