"""Which blocks have their rematerialized keys and values in the pool, decided once per step.

The pool has *hot blocks*; a map says which block of pages has which of them. The map goes by block ids and knows no
requests. It stays right when vLLM frees a block and gives it to another request, because whoever writes a page writes
the hot block too: for every block that has a hot block, its written tokens are the same in both. Where something else
than the store writes pages, their blocks are forgotten.

A sequence is attended from the pool if all blocks that it sees are hot, else from the pages. Rules:

* A block that gets its first token in this step needs no reading: it takes a hot block that is free, that belongs to a
  sequence which is attended from pages anyway, or else the least recently attended one outside of this step.
* Blocks that have tokens from before must be *promoted*: read from pages and rematerialized. For this only hot blocks
  are taken that are free or that nobody has attended for some steps, at first :data:`LEAST_IDLE_STEPS`. A promoted
  block that is pushed out before it was attended in :data:`PAYS_AFTER` steps was promoted in vain. Then that number is
  doubled, up to :data:`IDLE_STEPS`; :data:`CALM_STEPS` without such a loss halve it again. So requests that come one
  after the other find room at once, and two working sets that take turns soon stop pushing each other out.
* A sequence that finds no room is attended from pages, and its hot blocks become the first to be taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_IDLE_STEPS = 2
"""Steps without attention after which a hot block may be taken for a promotion, if promotions pay."""

IDLE_STEPS = 64
"""Likewise, where promotion after promotion was in vain."""

PAYS_AFTER = 5
"""Steps that a promoted block must be attended in: promoting takes as long as attending from pages four times or so."""

CALM_STEPS = 256
"""Steps without a promotion in vain after which hot blocks may be taken sooner again."""

PROMOTED_TOKENS = 2048
"""Tokens that are promoted in a step at most; a row that needs more takes several steps."""

Ints = NDArray[np.integer]


@dataclass(frozen=True)
class HotStep:
    """What one step does with the pool.

    Attributes:
        hot: ``[num_rows]`` bool, rows that are attended from the pool.
        block_table: ``[num_rows, columns]`` int32, hot blocks of the visible blocks of hot rows; 0 elsewhere.
        slots: ``[n]`` int64, slots in the pages of what is written to the pool: first promoted tokens, then new ones.
        positions: ``[n]`` int64, their positions.
        hot_slots: ``[n]`` int64, their slots in the pool.
        promoted: how many of them are promoted.
    """

    hot: NDArray[np.bool_]
    block_table: Ints
    slots: Ints
    positions: Ints
    hot_slots: Ints
    promoted: int


@dataclass(frozen=True)
class HotCounts:
    """Sums over steps.

    Attributes:
        hot_rows: rows attended from the pool.
        cold_rows: rows attended from pages.
        promoted_tokens: tokens read from pages into the pool.
        new_tokens: tokens written to the pool in the step that brought them.
        hot_tokens: tokens that the hot rows have attended to, in each step anew.
        cold_tokens: tokens that the cold rows have attended to, likewise.
    """

    hot_rows: int = 0
    cold_rows: int = 0
    promoted_tokens: int = 0
    new_tokens: int = 0
    hot_tokens: int = 0
    cold_tokens: int = 0

    def plus(self, more: "HotCounts", sign: int = 1) -> "HotCounts":
        """Both together, or with a ``sign`` of -1 what is left without ``more``."""
        return HotCounts(
            self.hot_rows + sign * more.hot_rows,
            self.cold_rows + sign * more.cold_rows,
            self.promoted_tokens + sign * more.promoted_tokens,
            self.new_tokens + sign * more.new_tokens,
            self.hot_tokens + sign * more.hot_tokens,
            self.cold_tokens + sign * more.cold_tokens,
        )


def attended_before(computed: Ints, window: int | None) -> Ints:
    """Of ``[num_rows]`` tokens that were there before a step, how many its queries see, likewise."""
    return computed if window is None else np.minimum(computed, window - 1)


class HotMap:
    """The map of one KV cache group, whose layers share a block table."""

    def __init__(
        self,
        num_hot_blocks: int,
        block_size: int,
        window: int | None = None,
        *,
        idle_steps: tuple[int, int] = (LEAST_IDLE_STEPS, IDLE_STEPS),
        promoted_tokens: int = PROMOTED_TOKENS,
    ) -> None:
        """Start with an empty pool.

        Args:
            num_hot_blocks: hot blocks of the pool; number 0 is never written and stands for vLLM's null block.
            block_size: tokens per block.
            window: keys that a query sees, itself included, or None for all.
            idle_steps: see :data:`LEAST_IDLE_STEPS` and :data:`IDLE_STEPS`.
            promoted_tokens: see :data:`PROMOTED_TOKENS`.
        """
        self.block_size, self.window = block_size, window
        # Since the start.
        self.counts = HotCounts()
        self._idle_limits, self._promoted_tokens = idle_steps, promoted_tokens
        self._step = 0
        self._idle, self._calm_from = idle_steps[0], 0
        self._hot_of = np.zeros(1024, np.int32)  # by block; 0: none
        self._block_of = np.zeros(max(1, num_hot_blocks), np.int64)  # by hot block; 0: free
        # By hot block: the step in which it was last attended or filled, and a mark of the row that did so.
        self._used = np.full(max(1, num_hot_blocks), -idle_steps[1], np.int64)
        self._row = np.zeros(max(1, num_hot_blocks), np.int64)
        # Of rows that are attended from pages: the first to be taken for new tokens.
        self._left = np.zeros(max(1, num_hot_blocks), bool)
        # In how many steps a promotion must still be attended to have paid; 0 where nothing was promoted.
        self._owes = np.zeros(max(1, num_hot_blocks), np.int64)

    @property
    def num_hot_blocks(self) -> int:
        """Hot blocks that can be filled."""
        return self._block_of.size - 1

    def hot_of(self, blocks: Ints) -> Ints:
        """The hot block of every block, 0 where there is none."""
        largest = int(blocks.max(initial=0))
        if largest >= self._hot_of.size:
            self._hot_of = np.concatenate((self._hot_of, np.zeros(largest + 1, np.int32)))
        return self._hot_of[blocks]

    def clear(self) -> None:
        """Forget all: pages were written by something else than the store."""
        self._hot_of[:] = 0
        self._block_of[:] = 0
        self._left[:] = False
        self._owes[:] = 0
        self._used[:] = self._step - self._idle_limits[1]

    def forget(self, blocks: Ints) -> None:
        """Forget blocks whose pages were written by something else than the store.

        Args:
            blocks: ``[n]``, block ids; those that have no hot block are left alone.
        """
        hot = self.hot_of(blocks)
        hot = hot[hot != 0]
        self._hot_of[blocks] = 0
        self._block_of[hot] = 0
        self._left[hot] = False
        self._owes[hot] = 0
        self._used[hot] = self._step - self._idle_limits[1]

    def plan(self, block_table: Ints, seq_lens: Ints, query_lens: Ints, from_pages: Ints | None = None) -> HotStep:
        """Decide on a step and change the map.

        The caller must then write all of :attr:`HotStep.slots` to the pool before it attends to it, in every layer.

        Args:
            block_table: ``[num_rows, max_blocks]``, block ids; entries past a row's end or behind its window may be
                anything.
            seq_lens: ``[num_rows]``, tokens of every row including the step's.
            query_lens: ``[num_rows]``, tokens of this step; rows without any are left out.
            from_pages: ``[num_rows]`` bool, rows that must be attended from pages although they may be hot.
        """
        self._step += 1
        if self._step >= self._calm_from + CALM_STEPS:
            self._idle, self._calm_from = max(self._idle // 2, self._idle_limits[0]), self._step
        size = self.block_size
        computed = seq_lens - query_lens
        seen = -(-seq_lens // size)
        taking_part = query_lens > 0
        seen = np.where(taking_part, seen, 0)
        first = np.zeros_like(seen) if self.window is None else np.maximum(computed - self.window + 1, 0) // size
        columns = np.arange(int(seen.max(initial=0)))
        visible = (columns >= first[:, None]) & (columns < seen[:, None])
        blocks = np.where(visible, block_table[:, : columns.size], 0)
        table = self.hot_of(blocks)
        missing = (table == 0) & (blocks != 0)
        lacking = missing.any(1)
        hot = ~lacking
        promotions: list[tuple[int, int, int]] = []
        if lacking.any():
            written = columns * size < computed[:, None]
            rows = _Rows(blocks, (missing & written).any(1), computed)
            hot = self._make_room(rows, lacking, promotions)
            table = self.hot_of(blocks)
        self._touch(table[hot], np.flatnonzero(hot)[:, None])
        self._owes -= (self._used == self._step) & (self._owes > 0)
        hot &= taking_part
        if from_pages is not None:
            hot &= ~from_pages
        promoted = self._tokens_of(promotions)
        new = self._new_tokens(blocks, computed, query_lens)
        slots, positions, hot_slots = (np.concatenate(pair) for pair in zip(promoted, new, strict=True))
        num_hot = int(hot.sum())
        num_cold = int(taking_part.sum()) - num_hot
        attended = np.where(taking_part, query_lens + attended_before(computed, self.window), 0)
        hot_tokens = int(attended[hot].sum())
        tokens = (hot_tokens, int(attended.sum()) - hot_tokens)
        self.counts = self.counts.plus(HotCounts(num_hot, num_cold, len(promoted[0]), len(new[0]), *tokens))
        shown = np.where(hot[:, None], table, 0).astype(np.int32, copy=False)
        return HotStep(hot, shown, slots, positions, hot_slots, len(promoted[0]))

    def _make_room(
        self, rows: "_Rows", lacking: NDArray[np.bool_], promotions: list[tuple[int, int, int]]
    ) -> NDArray[np.bool_]:
        """Give hot blocks to rows that lack some; which rows are hot then. Adds to ``promotions``."""
        hot = ~lacking
        grows = lacking & ~rows.promoted
        # Rows that go on come before rows that start, and shorter ones before longer ones.
        growing = sorted(np.flatnonzero(grows).tolist(), key=lambda row: (rows.computed[row] == 0, rows.count(row)))
        for row in growing:
            need = self._lacks(rows, row)
            taken = self._take_for_new(len(need), rows.blocks[hot | grows])
            grows[row] = False
            if taken is None:
                self._leave(rows.blocks[row], rows.blocks[hot | grows])
                continue
            self._give(need, taken, row)
            hot[row] = True
        budget = self._promoted_tokens
        for row in sorted(np.flatnonzero(lacking & rows.promoted).tolist(), key=rows.count):
            budget = self._promote(rows, row, hot, budget, promotions)
        return hot

    def _promote(
        self, rows: "_Rows", row: int, hot: NDArray[np.bool_], budget: int, promotions: list[tuple[int, int, int]]
    ) -> int:
        """Promote blocks of a row if there is room for all that it lacks; what is left of the budget."""
        own, need = rows.blocks[row], self._lacks(rows, row)
        if not len(need):  # another row has brought what they share
            hot[row] = True
            return budget
        if budget <= 0:
            return budget
        room = self._for_promotion(np.concatenate((rows.blocks[hot].ravel(), own)))
        if len(need) > len(room):
            self._leave(own, rows.blocks[hot])
            return budget
        for done, block in enumerate(need.tolist()):
            column = int(np.flatnonzero(own == block)[0])
            tokens = int(min(max(rows.computed[row] - column * self.block_size, 0), self.block_size))
            if done and tokens > budget:
                self._touch(self.hot_of(own), row)  # what it has by now stays until the rest has come
                return budget
            budget -= tokens
            self._give(np.array([block]), room[done : done + 1], row)
            if tokens:
                self._owes[room[done]] = PAYS_AFTER
                promotions.append((block, column, tokens))
        hot[row] = True
        return budget

    def _lacks(self, rows: "_Rows", row: int) -> Ints:
        """Blocks of a row that have no hot block by now: other rows bring what they share and take what they need."""
        blocks = rows.blocks[row]
        return blocks[(blocks != 0) & (self.hot_of(blocks) == 0)]

    def _take_for_new(self, count: int, kept: Ints) -> Ints | None:
        """Hot blocks for new tokens, or None if there are not as many."""
        kept_hot = self.hot_of(kept.ravel())
        may = np.ones(self._block_of.size, bool)
        may[0] = False
        may[kept_hot] = False
        candidates = np.flatnonzero(may)
        if len(candidates) < count:
            return None
        free = self._block_of[candidates] != 0
        order = np.lexsort((self._row[candidates], self._used[candidates], ~self._left[candidates], free))
        return candidates[order[:count]]

    def _for_promotion(self, kept: Ints) -> Ints:
        """Hot blocks that a promotion may take, the best first."""
        may = (self._block_of == 0) | (self._step - self._used >= self._idle)
        may[0] = False
        may[self.hot_of(kept.ravel())] = False
        candidates = np.flatnonzero(may)
        return candidates[np.lexsort((self._used[candidates], self._block_of[candidates] != 0))]

    def _give(self, blocks: Ints, hot: Ints, row: int) -> None:
        """Map blocks to hot blocks, which lose what they had."""
        before = self._block_of[hot]
        self._hot_of[before[before != 0]] = 0
        if self._owes[hot].any():
            self._lose()
        self._owes[hot] = 0
        self._block_of[hot] = blocks
        self._hot_of[blocks] = hot
        self._touch(hot, row)

    def _lose(self) -> None:
        """A promotion was in vain: be more patient from the next step on."""
        if self._calm_from <= self._step:
            self._idle = min(2 * self._idle, self._idle_limits[1])
        self._calm_from = self._step + 1

    def _touch(self, hot: Ints, row: Ints | int) -> None:
        """Note that hot blocks are attended by rows of this step."""
        self._used[hot] = self._step
        self._row[hot] = row
        self._left[hot] = False

    def _leave(self, blocks: Ints, kept: Ints) -> None:
        """A row is attended from pages: its hot blocks may go, but for those that hot rows share."""
        self._left[self.hot_of(blocks)] = True
        self._left[self.hot_of(kept.ravel())] = False

    def _tokens_of(self, promotions: Sequence[tuple[int, int, int]]) -> tuple[Ints, Ints, Ints]:
        """Slots, positions and hot slots of promoted blocks (block, its index in the row, tokens)."""
        if not promotions:
            none = np.zeros(0, np.int64)
            return none, none, none
        size = self.block_size
        block, column, tokens = np.array(promotions, np.int64).T
        offsets = np.arange(size)
        kept = offsets < tokens[:, None]
        starts = (block * size, column * size, self.hot_of(block).astype(np.int64) * size)
        slots, positions, hot_slots = ((start[:, None] + offsets)[kept] for start in starts)
        return slots, positions, hot_slots

    def _new_tokens(self, blocks: Ints, computed: Ints, query_lens: Ints) -> tuple[Ints, Ints, Ints]:
        """Those of the step's tokens whose blocks are hot, likewise."""
        size = self.block_size
        rows = np.repeat(np.arange(len(query_lens)), query_lens)
        ends = np.cumsum(query_lens)
        positions = np.arange(len(rows)) + np.repeat(computed - (ends - query_lens), query_lens)
        of_token = blocks[rows, positions // size] if len(rows) else np.zeros(0, np.int64)
        hot = self.hot_of(of_token).astype(np.int64)
        offsets = positions % size
        kept = hot > 0
        slots = of_token.astype(np.int64) * size + offsets
        return slots[kept], positions[kept].astype(np.int64), (hot * size + offsets)[kept]


@dataclass(frozen=True)
class _Rows:
    """The rows of a step while room is made for them.

    Attributes:
        blocks: ``[num_rows, columns]``, visible blocks, else 0.
        promoted: ``[num_rows]``, whether a block without hot block has tokens from before.
        computed: ``[num_rows]``, tokens from before.
    """

    blocks: Ints
    promoted: NDArray[np.bool_]
    computed: Ints

    def count(self, row: int) -> int:
        """Visible blocks of a row."""
        return int((self.blocks[row] != 0).sum())
