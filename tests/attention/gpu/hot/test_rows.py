"""Which rows are hot, under Triton's interpreter, against the host's own decision; and attention to them."""

import random

import numpy as np
import pytest
import torch

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.hot.rows import HotRowTensors, LocatedRows
from xquant_vllm.attention.hot.policy import HotMap

BLOCK, BLOCKS, COLUMNS, ROWS, TOKENS = 16, 200, 150, 6, 400
CPU = torch.device("cpu")


class Step:
    """A batch of rows with blocks of their own, garbage where a kernel must not look."""

    def __init__(self, rows: list[tuple[int, int]], choose: random.Random, window: int | None = None) -> None:
        """Of every row its tokens and how many of them are new."""
        self.window = window
        counts, lengths = [new for _, new in rows], [length for length, _ in rows]
        self.starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        free = choose.sample(range(1, BLOCKS), BLOCKS - 1)
        self.table = torch.full((len(rows), COLUMNS), 1 << 30, dtype=torch.int32)
        slots = []
        for row, (length, new) in enumerate(rows):
            first = max(0, length - new - window + 1) // BLOCK if window else 0
            for column in range(first, -(-length // BLOCK)):
                self.table[row, column] = free.pop()
            slots += [
                int(self.table[row, position // BLOCK]) * BLOCK + position % BLOCK
                for position in range(length - new, length)
            ]
        self.slots = torch.tensor(slots, dtype=torch.int64)
        self.counts = np.array(counts, np.int64)

    @property
    def batch(self) -> AttentionBatch:
        return AttentionBatch(self.starts, self.lengths, self.table, int(self.counts.max()))

    def planned(self, hot_map: HotMap, exact: np.ndarray | None = None):
        readable = torch.where(self.table < BLOCKS, self.table, 0).numpy()
        return hot_map.plan(readable, self.lengths.numpy().astype(np.int64), self.counts, exact)


def hot_of(hot_map: HotMap) -> torch.Tensor:
    return torch.from_numpy(hot_map.hot_of(np.arange(BLOCKS)).astype(np.int32))


def assert_as_planned(rows: LocatedRows, step: Step, planned) -> None:
    hot = torch.from_numpy(planned.hot)
    assert torch.equal(rows.hot.seq_lens, torch.where(hot, step.lengths, 0))
    assert torch.equal(rows.cold.seq_lens, torch.where(hot, 0, step.lengths))
    assert torch.equal(rows.hot_tokens, hot.repeat_interleave(torch.from_numpy(step.counts)))
    for row in np.flatnonzero(planned.hot):
        wanted = planned.block_table[row]
        assert torch.equal(rows.hot.block_table[row, : len(wanted)][wanted != 0], torch.from_numpy(wanted[wanted != 0]))
    new = slice(planned.promoted, None)
    written = rows.written.hot_slots >= 0
    for actual, wanted in (
        (rows.written.slots, planned.slots),
        (rows.written.positions, planned.positions),
        (rows.written.hot_slots, planned.hot_slots),
    ):
        assert torch.equal(actual[written], torch.from_numpy(wanted[new]))


@pytest.mark.parametrize("seed", range(12))
def test_as_the_host_decides(seed: int) -> None:
    """Rows whose blocks are hot, some hot, or none."""
    choose = random.Random(seed)
    window = choose.choice((None, None, 40))
    rows = [(past + new, new) for past, new in ((choose.randint(0, 600), choose.choice((1, 3, 40))) for _ in range(4))]
    step = Step(rows, choose, window)
    exact_from = choose.choice((None, 20))
    hot_map = HotMap(choose.choice((10, 40, 120)), BLOCK, window, promoted_tokens=choose.choice((100, 1000)))
    planned = step.planned(hot_map, None if exact_from is None else step.counts >= exact_from)
    tensors = HotRowTensors(ROWS, COLUMNS, TOKENS, CPU)
    located = tensors.locate(step.batch, step.slots, hot_of(hot_map), BLOCK, window, exact_from)
    assert_as_planned(located, step, planned)


def test_a_graph_reads_no_more_of_the_step_before() -> None:
    """A smaller batch leaves lengths of 0 and no tokens where a larger one was, at the same addresses."""
    choose, hot_map = random.Random(1), HotMap(100, BLOCK)
    tensors = HotRowTensors(ROWS, COLUMNS, TOKENS, CPU)
    first, second = Step([(30, 30), (100, 1), (20, 1)], choose), Step([(17, 1)], choose)
    first.planned(hot_map)
    before = tensors.locate(first.batch, first.slots, hot_of(hot_map), BLOCK, None, None)
    assert before.hot.seq_lens.any()
    planned = second.planned(hot_map)
    after = tensors.locate(second.batch, second.slots, hot_of(hot_map), BLOCK, None, None)
    assert_as_planned(after, second, planned)
    for x, y in (
        (before.hot.seq_lens, after.hot.seq_lens),
        (before.cold.seq_lens, after.cold.seq_lens),
        (before.hot.block_table, after.hot.block_table),
        (before.written.hot_slots, after.written.hot_slots),
        (before.written.slots, after.written.slots),
        (before.written.positions, after.written.positions),
        (before.hot_tokens, after.hot_tokens),
    ):
        assert x.data_ptr() == y.data_ptr()
    assert not before.hot.seq_lens[1:].any()
    assert not before.cold.seq_lens[1:].any()
    assert (before.written.hot_slots[1:] == -1).all()


def test_padding_and_what_the_store_leaves_out() -> None:
    """Rows without tokens are neither hot nor cold; a token without a slot in the pages has none in the pool."""
    choose, hot_map = random.Random(2), HotMap(100, BLOCK)
    step = Step([(40, 2), (30, 1)], choose)
    step.planned(hot_map)
    starts = torch.tensor([0, 2, 3, 3, 3], dtype=torch.int32)
    lengths = torch.tensor([40, 30, 0, 0], dtype=torch.int32)
    table = torch.cat((step.table, torch.full((2, COLUMNS), 1 << 30, dtype=torch.int32)))
    slots = torch.cat((step.slots, torch.full((3,), -1, dtype=torch.int64)))
    slots[1] = -1
    tensors = HotRowTensors(ROWS, COLUMNS, TOKENS, CPU)
    rows = tensors.locate(AttentionBatch(starts, lengths, table, 2), slots, hot_of(hot_map), BLOCK, None, None)
    assert rows.hot.seq_lens.tolist() == [40, 30, 0, 0]
    assert rows.cold.seq_lens.tolist() == [0, 0, 0, 0]
    assert (rows.written.hot_slots >= 0).tolist() == [True, False, True, False, False, False]
