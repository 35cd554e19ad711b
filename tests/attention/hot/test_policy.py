"""The map from blocks to hot blocks, on traces such as vLLM's scheduler makes them."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from xquant_vllm.attention.hot.policy import CALM_STEPS, LEAST_IDLE_STEPS, PAYS_AFTER, HotMap, HotStep

ABSURD = 2**31 - 1


@dataclass
class Sequence:
    """Tokens are numbers that name their content: what a page or a hot block holds can be compared."""

    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    computed: int = 0


class World:
    """Pages and a pool that hold the names of tokens, and the check of what is attended."""

    def __init__(self, num_hot: int, block_size: int = 4, window: int | None = None, **options) -> None:
        self.size, self.window = block_size, window
        self.map = HotMap(num_hot + 1, block_size, window, **options)
        self.pages: dict[int, int] = {}
        self.pool: dict[int, int] = {}

    def step(self, sequences: list[tuple[Sequence, int]], padding: int = 0, from_pages=None) -> HotStep:
        """Each sequence with some query tokens; its tokens up to then must be named and its blocks allotted."""
        width = max([len(s.blocks) for s, _ in sequences], default=0) + 2
        table = np.full((len(sequences) + padding, width), ABSURD, np.int32)
        for row, (sequence, _) in enumerate(sequences):
            table[row, : len(sequence.blocks)] = sequence.blocks
        seq_lens = np.array([s.computed + n for s, n in sequences] + [0] * padding, np.int64)
        query_lens = np.array([n for _, n in sequences] + [0] * padding, np.int64)
        if from_pages is not None:
            from_pages = np.array(from_pages + [False] * padding, bool)
        for sequence, count in sequences:  # the store comes first
            for position in range(sequence.computed, sequence.computed + count):
                block = sequence.blocks[position // self.size]
                self.pages[block * self.size + position % self.size] = sequence.tokens[position]
        step = self.map.plan(table, seq_lens, query_lens, from_pages)
        for slot, position, hot_slot in zip(step.slots, step.positions, step.hot_slots, strict=True):
            assert hot_slot >= self.size
            assert slot % self.size == hot_slot % self.size == position % self.size
            self.pool[int(hot_slot)] = self.pages[int(slot)]
        for row, (sequence, count) in enumerate(sequences):
            if step.hot[row]:
                self.check(sequence, count, step.block_table[row])
        assert not step.hot[len(sequences) :].any()
        return step

    def check(self, sequence: Sequence, count: int, row: np.ndarray) -> None:
        oldest = 0 if self.window is None else max(0, sequence.computed - self.window + 1)
        for position in range(oldest, sequence.computed + count):
            hot_slot = int(row[position // self.size]) * self.size + position % self.size
            assert self.pool[hot_slot] == sequence.tokens[position]

    def forget(self, block: int) -> None:
        """A block has a new owner: what it holds is no one's."""
        for offset in range(self.size):
            self.pages.pop(block * self.size + offset, None)

    def check_all(self) -> None:
        """Every hot block holds what its page holds, as far as the page was written."""
        for block in np.flatnonzero(self.map._hot_of):
            hot = int(self.map._hot_of[block])
            assert self.map._block_of[hot] == block
            for offset in range(self.size):
                if block * self.size + offset in self.pages:
                    assert self.pool[hot * self.size + offset] == self.pages[block * self.size + offset]
        used = self.map._block_of[self.map._block_of != 0]
        assert len(set(used.tolist())) == len(used)


def grow(sequence: Sequence, count: int, size: int, free: list[int], names) -> None:
    while len(sequence.tokens) < sequence.computed + count:
        sequence.tokens.append(next(names))
    while len(sequence.blocks) * size < sequence.computed + count:
        sequence.blocks.append(free.pop(0))


class Blocks:
    """vLLM's block pool: blocks that several sequences share, and freed ones that keep their content until reused."""

    def __init__(self, count: int) -> None:
        self.free = list(range(1, count))
        self.users = dict.fromkeys(self.free, 0)
        self.cached: list[Sequence] = []  # of which whole blocks may be hit

    def allot(self) -> int:
        block = self.free.pop(0)
        self.users[block] = 1
        self.cached = [sequence for sequence in self.cached if block not in sequence.blocks]
        return block

    def release(self, block: int) -> None:
        if block:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)

    def hit(self, sequence: Sequence) -> None:
        for block in sequence.blocks:
            if not self.users[block]:
                self.free.remove(block)
            self.users[block] += 1


@pytest.mark.parametrize("seed", range(150))
def test_what_is_hot_is_what_the_pages_hold(seed: int) -> None:
    """Prompts in chunks, prefix hits, preemption, blocks freed and reused, rejected drafts, windows, padding."""
    choose = random.Random(seed)
    size = choose.choice((2, 4, 8))
    window = choose.choice((None, None, 3, 9, 20))
    options = {"idle_steps": choose.choice(((1, 1), (1, 8), (3, 64))), "promoted_tokens": choose.choice((1, 10, 99))}
    world = World(choose.choice((3, 8, 20, 60)), size, window, **options)
    blocks, names = Blocks(70), iter(range(1, 10**9))
    running: list[Sequence] = []

    def end(sequence: Sequence) -> None:
        running.remove(sequence)
        for block in sequence.blocks:
            blocks.release(block)

    for _ in range(120):
        if len(running) < 5 and choose.random() < 0.4:
            sequence = Sequence()
            if blocks.cached and choose.random() < 0.6:
                other = choose.choice(blocks.cached)
                count = choose.randint(1, len(other.blocks))
                sequence = Sequence(other.blocks[:count], other.tokens[: count * size], count * size)
                blocks.hit(sequence)
            running.append(sequence)
        batch = []
        for sequence in list(running):
            if choose.random() < 0.25:
                continue
            count = choose.choice((1, 1, 1, 2, 5, 13))
            while len(sequence.tokens) < sequence.computed + count:
                sequence.tokens.append(next(names))
            while len(sequence.blocks) * size < sequence.computed + count and blocks.free:
                sequence.blocks.append(blocks.allot())
                world.forget(sequence.blocks[-1])
            if len(sequence.blocks) * size < sequence.computed + count:  # preempted
                end(sequence)
                continue
            batch.append((sequence, count))
        choose.shuffle(batch)
        world.step(batch, choose.choice((0, 0, 2)), [choose.random() < 0.1 for _ in batch])
        world.check_all()
        for sequence, count in batch:
            sequence.computed += choose.randint(1, count)
            for position in range(sequence.computed, len(sequence.tokens)):  # rejected drafts
                world.pages.pop(sequence.blocks[position // size] * size + position % size, None)
            del sequence.tokens[sequence.computed :]
            whole = sequence.computed // size
            if whole and 0 not in sequence.blocks:
                blocks.cached.append(Sequence(sequence.blocks[:whole], sequence.tokens[: whole * size]))
            if window is not None:  # wholly behind the window: vLLM's null block
                for column in range(max(0, sequence.computed - window + 1) // size):
                    block, sequence.blocks[column] = sequence.blocks[column], 0
                    blocks.release(block)
            if choose.random() < 0.04:
                end(sequence)


def sequences(count: int, blocks: int, size: int, first: int) -> list[Sequence]:
    """Decoding, with one token missing to the end of their last block."""
    tokens = blocks * size
    starts = range(first, first + count * blocks, blocks)
    return [Sequence(list(range(at, at + blocks)), list(range(1, tokens + 1)), tokens - 1) for at in starts]


def seldom(*numbers: int) -> list:
    return [pytest.param(number, marks=pytest.mark.nightly) for number in numbers]


@pytest.mark.parametrize("pool", [9, 33, 60, *seldom(16, 40)])
@pytest.mark.parametrize("period", [1, 2, 5, 8, 64, 129, *seldom(3, 4, 6, 7, 10, 31, 63, 65, 80, 100, 300, 1000)])
def test_working_sets_that_take_turns_do_not_thrash(period: int, pool: int) -> None:
    """Two sets of four sequences of eight blocks, and a pool for one to seven of these: never slower than without."""
    size, steps = 4, 3000
    world = World(pool, size)
    halves = [sequences(4, 8, size, 1), sequences(4, 8, size, 101)]
    for sequence in [*halves[0], *halves[1]]:
        for position in range(sequence.computed):
            world.pages[sequence.blocks[position // size] * size + position % size] = position + 1
    for step in range(steps):
        world.step([(sequence, 1) for sequence in halves[step // period % 2]])
    counts = world.map.counts
    # In tokens of cold attention: a token is promoted in the time in which four are attended from pages.
    without, cold = steps * 4 * 8 * size, counts.cold_rows * 8 * size
    assert cold + 4 * counts.promoted_tokens <= without
    if period <= PAYS_AFTER:  # no promotion can pay
        assert counts.promoted_tokens <= pool * size * (8 + 2 * steps // CALM_STEPS)
    assert counts.hot_rows >= 0.9 * (pool // 8) / 8 * steps * 4


def test_requests_that_come_one_after_the_other_find_room() -> None:
    """Users who come back: a pool for two of 23 histories, two at a time, each hot but for its first steps."""
    size, blocks, steps_each = 16, 12, 9
    hot_map = HotMap(2 * blocks + 5, size)
    tables = np.arange(1, 23 * blocks + 1).reshape(23, blocks)
    running = [(0, 0), (1, 4)]
    following = 2
    for _ in range(600):
        table = tables[[user for user, _ in running]]
        hot_map.plan(table, np.full(2, blocks * size), np.ones(2, np.int64))
        for at, (user, step) in enumerate(running):
            running[at] = (user, step + 1)
            if step + 1 == steps_each:
                running[at], following = (following % 23, 0), following + 1
    counts = hot_map.counts
    assert counts.hot_rows >= 0.75 * (counts.hot_rows + counts.cold_rows)


def test_patience_ends_when_the_load_is_calm() -> None:
    """Turns of three steps teach patience; single requests later find room at once."""
    size = 4
    hot_map = HotMap(9, size)
    first, second = np.arange(1, 9)[None], np.arange(11, 19)[None]
    for step in range(60):
        hot_map.plan(first if step // 3 % 2 else second, np.array([32]), np.array([1]))
    assert hot_map.counts.promoted_tokens <= 8 * 31
    for _ in range(6 * CALM_STEPS):
        hot_map.plan(first, np.array([32]), np.array([1]))
    hot = [bool(hot_map.plan(second, np.array([32]), np.array([1])).hot[0]) for _ in range(LEAST_IDLE_STEPS + 1)]
    assert hot == [False] * (LEAST_IDLE_STEPS - 1) + [True] * 2


@pytest.mark.parametrize("steps", [3, 12])
def test_groups_that_are_submitted_again_do_not_thrash(steps: int) -> None:
    """Prefixes are where they were, what follows is in other blocks every time: these must not push prefixes out."""
    size, rows, prefix, tail = 16, 4, 5, 2
    pool = 3 * 2 * rows * (prefix + tail) // 4
    hot_map = HotMap(pool + 1, size)
    prefixes = np.arange(1, 2 * rows * prefix + 1).reshape(2, rows, prefix)
    free = list(range(1000, 1100))
    for turn in range(100):
        tails, free = free[: rows * tail], free[rows * tail :] + free[: rows * tail]
        table = np.concatenate((prefixes[turn % 2], np.reshape(tails, (rows, tail))), 1)
        computed = np.full(rows, prefix * size if turn > 1 else 0)
        for step in range(steps):
            length = np.full(rows, (prefix + 1) * size + step)
            hot_map.plan(table, length, length - computed)
            computed = length
    counts = hot_map.counts
    in_all = counts.hot_rows + counts.cold_rows
    assert 4 * counts.promoted_tokens <= counts.hot_rows * prefix * size
    # Short turns do not pay for a promotion: some sequences are hot all the time. Long ones do.
    assert counts.hot_rows >= (0.5 if steps < PAYS_AFTER else 0.9) * in_all
    if steps < PAYS_AFTER:
        assert counts.promoted_tokens <= pool * size * (8 + 2 * 100 * steps // CALM_STEPS)


def test_rows_that_grow_push_out_few_others() -> None:
    """A full pool of decoding rows: those that give way go one by one."""
    size, pool = 4, 40
    world = World(pool, size)
    free, names = list(range(1, 10**6)), iter(range(1, 10**9))
    rows = [Sequence() for _ in range(10)]
    hot = []
    for _ in range(60):
        for row in rows:
            grow(row, 1, size, free, names)
        hot.append(int(world.step([(row, 1) for row in rows]).hot.sum()))
        for row in rows:
            row.computed += 1
    blocks = [-(-(step + 1) // size) for step in range(60)]
    assert hot[:16] == [10] * 16
    assert all(count == min(10, pool // needed) for count, needed in zip(hot, blocks, strict=True))
    assert world.map.counts.promoted_tokens == 0


def test_promotion_is_bounded_per_step_and_keeps_its_progress() -> None:
    size = 4
    world = World(40, size, promoted_tokens=16)
    (row,) = sequences(1, 12, size, 1)
    world.pages.update({row.blocks[p // size] * size + p % size: p + 1 for p in range(row.computed)})
    steps = [world.step([(row, 1)]) for _ in range(4)]
    assert [step.promoted for step in steps] == [16, 16, 15, 0]
    assert [bool(step.hot[0]) for step in steps] == [False, False, True, True]


def test_row_longer_than_the_pool_is_attended_from_pages() -> None:
    world = World(4, 4)
    long, short = sequences(1, 6, 4, 1)[0], Sequence()
    world.pages.update({long.blocks[p // 4] * 4 + p % 4: p + 1 for p in range(long.computed)})
    grow(short, 5, 4, list(range(50, 60)), iter(range(1000, 2000)))
    step = world.step([(long, 1), (short, 5)])
    assert step.hot.tolist() == [False, True]
    assert step.promoted == 0
    assert step.block_table[0].tolist() == [0] * 6


def test_least_recently_attended_goes_first() -> None:
    world = World(4, 4, idle_steps=(9, 9))
    free, names = list(range(1, 100)), iter(range(1, 1000))
    first, second, third = Sequence(), Sequence(), Sequence()
    for row in (first, second):
        grow(row, 8, 4, free, names)
        world.step([(row, 8)])
        row.computed = 7
    world.step([(first, 1)])
    grow(third, 4, 4, free, names)
    assert world.step([(third, 4)]).hot.all()
    assert world.step([(first, 1)]).hot.all()
    assert not world.step([(second, 1)]).hot.any()


def test_promotion_takes_what_was_idle_for_long() -> None:
    world = World(4, 4, idle_steps=(5, 5))
    free, names = list(range(1, 100)), iter(range(1, 1000))
    first, second = Sequence(), Sequence()
    for row in (first, second):
        grow(row, 12, 4, free, names)
        world.step([(row, 12)])
        row.computed = 11
    hot = [bool(world.step([(first, 1)]).hot[0]) for _ in range(6)]
    assert hot == [False] * 4 + [True] * 2


def test_clear_forgets() -> None:
    world = World(8, 4)
    row = Sequence()
    grow(row, 9, 4, list(range(1, 9)), iter(range(1, 100)))
    world.step([(row, 9)])
    row.computed = 8
    world.map.clear()
    step = world.step([(row, 1)])
    assert step.promoted == 8
    assert step.hot.all()


def test_blocks_that_others_write_are_forgotten() -> None:
    """They are promoted anew, the others stay; a block that was never hot may be among them."""
    world = World(8, 4)
    row = Sequence()
    grow(row, 9, 4, list(range(1, 9)), iter(range(1, 100)))
    world.step([(row, 9)])
    row.computed = 8
    world.map.forget(np.array([row.blocks[1], 5000]))
    step = world.step([(row, 1)])
    assert step.promoted == 4
    assert step.hot.all()


@pytest.mark.parametrize(("window", "hot", "cold"), [(None, 40 + 9 + 41, 20 + 21), (16, 40 + 9 + 16, 20 + 16)])
def test_tokens_are_counted_where_they_are_attended(window, hot, cold):
    """Those that the queries of a row see, the row's own among them; padding and rows without tokens see none."""
    hot_map = HotMap(20, 8, window)
    table = np.arange(1, 19).reshape(3, 6)
    hot_map.plan(table, np.array([40, 20, 9]), np.array([40, 20, 9]), np.array([False, True, False]))
    hot_map.plan(table, np.array([41, 21, 9]), np.array([1, 1, 0]), np.array([False, True, False]))
    assert (hot_map.counts.hot_tokens, hot_map.counts.cold_tokens) == (hot, cold)
