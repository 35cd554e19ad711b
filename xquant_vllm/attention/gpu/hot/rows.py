"""Which rows of a batch are attended from the pool, and where its new tokens go: found out on the device.

The host decides which blocks are hot. It need not know the order of the rows for this, nor how many drafted tokens a
sequence has kept, so nothing is read back: a row is hot if all blocks that it sees are.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu.operands import ATTENDS
from xquant_vllm.attention.hot.tokens import HotTokens

_TILE = 128
# More query tokens than any row has.
_NEVER = 1 << 30


@triton.jit(do_not_specialize=["table_stride", "num_columns", "hot_stride"])
def locate_rows(
    query_start_loc,
    seq_lens,
    block_table,
    table_stride,
    num_columns,
    slot_mapping,
    hot_of,
    block_size,
    window,
    exact_from,
    hot_table,
    hot_stride,
    hot_lens,
    cold_lens,
    slots,
    positions,
    hot_slots,
    hot_tokens,
    TILE: tl.constexpr,
):
    """Translate one row and place its new tokens.

    Grid: ``(rows,)``. Reads what vLLM knows of the batch and ``hot_of``; writes the tensors of :class:`HotRowTensors`.

    Args:
        num_columns: of the block table.
        slot_mapping: int64 ``[tokens]``, where the store writes them; negative: it does not.
        hot_of: int32 ``[blocks]``, hot blocks; 0: none.
        window: keys that a query sees; 0: all.
        exact_from: rows with so many query tokens are attended from pages.
    """
    row = tl.program_id(0)
    first_token = tl.load(query_start_loc + row)
    query_len = tl.load(query_start_loc + row + 1) - first_token
    seq_len = tl.load(seq_lens + row)
    past = seq_len - query_len
    hot = ((query_len > 0) & (seq_len > 0) & (query_len < exact_from)).to(tl.int32)
    first_column = 0
    if window > 0:
        first_column = tl.maximum(past - window + 1, 0) // block_size
    seen = tl.minimum(tl.cdiv(tl.maximum(seq_len, 0), block_size), num_columns)
    for start in range(0, seen, TILE):
        column = start + tl.arange(0, TILE)
        visible = (column >= first_column) & (column < seen)
        block = tl.load(block_table + row.to(tl.int64) * table_stride + column, visible, 0)
        hot_block = tl.load(hot_of + block, visible, 0)
        missing = visible & (block != 0) & (hot_block == 0)
        hot = tl.where(tl.max(missing.to(tl.int32), 0) > 0, 0, hot)
        tl.store(hot_table + row.to(tl.int64) * hot_stride + column, hot_block, column < seen)
    tl.store(hot_lens + row, tl.where(hot > 0, seq_len, 0))
    tl.store(cold_lens + row, tl.where(hot > 0, 0, seq_len))
    for start in range(0, query_len, TILE):
        token = start + tl.arange(0, TILE)
        there = token < query_len
        at = first_token + token
        slot = tl.load(slot_mapping + at, there, -1)
        stored = slot >= 0
        block = tl.where(stored, slot, 0) // block_size
        hot_block = tl.load(hot_of + block, there & stored, 0).to(tl.int64)
        hot_slot = tl.where(hot_block > 0, hot_block * block_size + slot - block * block_size, -1)
        tl.store(slots + at, slot, there)
        tl.store(positions + at, (past + token).to(tl.int64), there)
        tl.store(hot_slots + at, hot_slot, there)
        tl.store(hot_tokens + at, (hot + tl.zeros_like(token)).to(tl.int8), there)


@dataclass(frozen=True)
class LocatedRows:
    """The rows of a batch.

    Attributes:
        written: tokens that go to the pool; slots of -1 do not.
        hot: all rows, lengths of those that are not hot 0, and the block table translated to hot blocks.
        cold: all rows, lengths of those that are hot 0.
        hot_tokens: ``[tokens]`` bool, query tokens of hot rows.
    """

    written: HotTokens
    hot: AttentionBatch
    cold: AttentionBatch
    hot_tokens: torch.Tensor


class HotRowTensors:
    """What :func:`locate_rows` writes: tensors that stay where they are, as CUDA graphs keep their addresses."""

    def __init__(self, rows: int, columns: int, tokens: int, device: torch.device) -> None:
        """Take the memory.

        Args:
            rows: of a batch at most.
            columns: of a block table at most.
            tokens: query tokens of a batch at most.
            device: where.
        """
        self._table = torch.zeros(rows, columns, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(2, rows, dtype=torch.int32, device=device)
        self._tokens = torch.full((3, tokens), -1, dtype=torch.int64, device=device)
        self._hot_tokens = torch.zeros(tokens, dtype=torch.bool, device=device)

    def locate(
        self,
        batch: AttentionBatch,
        slot_mapping: torch.Tensor,
        hot_of: torch.Tensor,
        block_size: int,
        window: int | None,
        exact_from: int | None,
    ) -> LocatedRows:
        """Find out which rows are hot; launches depend on the batch's shape alone.

        Args:
            batch: the rows.
            slot_mapping: int64 ``[tokens]``, slots of the new tokens in the pages; negative ones are not stored.
            hot_of: int32 ``[blocks]``, hot blocks; 0: none.
            block_size: tokens of a block.
            window: keys that a query sees, or None for all.
            exact_from: rows with so many query tokens are attended from pages; None: no matter how many.

        Raises:
            ValueError: the batch has more rows or tokens than were said.
        """
        rows, tokens = batch.seq_lens.shape[0], slot_mapping.shape[0]
        if rows > self._table.shape[0] or tokens > self._hot_tokens.shape[0]:
            raise ValueError(
                f"a batch of {rows} sequences and {tokens} tokens, at most {self._table.shape[0]} and "
                f"{self._hot_tokens.shape[0]} were expected"
            )
        # A graph reads more rows and tokens than this batch may have.
        self._lengths.zero_()
        self._tokens[2].fill_(-1)
        hot_lens, cold_lens = (of[:rows] for of in self._lengths)
        slots, positions, hot_slots = (of[:tokens] for of in self._tokens)
        hot_tokens = self._hot_tokens[:tokens]
        table = self._table[:rows, : min(batch.block_table.shape[1], self._table.shape[1])]
        locate_rows[(rows,)](
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table,
            batch.block_table.stride(0),
            table.shape[1],
            slot_mapping,
            hot_of,
            block_size,
            window or 0,
            _NEVER if exact_from is None else exact_from,
            table,
            table.stride(0),
            hot_lens,
            cold_lens,
            slots,
            positions,
            hot_slots,
            hot_tokens.view(torch.int8),
            TILE=_TILE,
            **ATTENDS,
        )
        return LocatedRows(
            HotTokens(slots, positions, hot_slots),
            replace(batch, seq_lens=hot_lens, block_table=table),
            replace(batch, seq_lens=cold_lens),
            hot_tokens,
        )
