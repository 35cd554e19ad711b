"""The sequences of an attention call, in vLLM's terms but without vLLM."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True)
class AttentionBatch:
    """A batch of sequences, each with some query tokens at the end of its cached tokens.

    Attributes:
        query_start_loc: ``[num_seqs + 1]`` int32, first query token of every sequence.
        seq_lens: ``[num_seqs]`` int32, cached tokens including the query tokens; their slots are already written.
        block_table: ``[num_seqs, max_blocks]`` int32, block ids; entries past a sequence's last block, and those wholly
            behind the sliding window, are arbitrary and never read.
        max_query_len: query tokens of a sequence at most, known without reading from a device; None: to be found out.
        lengths: for every sequence its query tokens and its cached tokens, known likewise; None: not known. Cached
            tokens of sequences that decode may be overstated.
        decode_tokens: sequences with so many query tokens at most *decode*. The others *prefill*, unless ``lengths``
            are not known: then all decode.
        prefill: what kernels made of the lengths, once for all layers (gpu/prefill/step.py); None: nothing was made.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int | None = None
    lengths: tuple[tuple[int, int], ...] | None = None
    decode_tokens: int = 1
    prefill: Any = None

    @cached_property
    def decoding(self) -> "Decoding":
        """Which sequences decode; reads from the device only where nothing is known of query tokens."""
        sequences, longest = self.seq_lens.shape[0], self.max_query_len
        if longest is None and self.lengths is None:
            longest = int((self.query_start_loc[1:] - self.query_start_loc[:-1]).max()) if sequences else 0
        if self.lengths is None or (longest is not None and longest <= self.decode_tokens):
            assert longest is not None
            return Decoding(DecodingRun(0, sequences, longest), ())
        first, *later = self._decoding_runs(self.lengths)
        return Decoding(first, tuple(later))

    def _decoding_runs(self, lengths: tuple[tuple[int, int], ...]) -> "Iterator[DecodingRun]":
        """The leading run, which may have no sequence, and those behind sequences that prefill."""
        first, longest = 0, 1
        for sequence, (query_len, _) in enumerate((*lengths, (self.decode_tokens + 1, 0))):
            if query_len <= self.decode_tokens:
                longest = max(longest, query_len)
                continue
            if first == 0 or first < sequence:
                yield DecodingRun(first, sequence, longest)
            first, longest = sequence + 1, 1


@dataclass(frozen=True)
class DecodingRun:
    """Sequences that decode, one after another.

    Attributes:
        first: index of the first.
        stop: index after the last.
        longest: query tokens of one of them at most.
    """

    first: int
    stop: int
    longest: int


@dataclass(frozen=True)
class Decoding:
    """The sequences of a batch that decode.

    Attributes:
        leading: those before the first that prefills.
        later: the others. vLLM puts decoding sequences first, but takes the word of the least of its backends for how
            many query tokens these have.
    """

    leading: DecodingRun
    later: tuple[DecodingRun, ...]


@dataclass(frozen=True)
class WholeSequences:
    """Sequences whose keys and values are all there, side by side in the order of their queries.

    Attributes:
        query_starts: ``[sequences + 1]`` int32, first query token of every sequence.
        key_starts: ``[sequences + 1]`` int32, its first key.
        query_lens: query tokens of every sequence.
        key_lens: its keys; 0 where nothing is to be attended to.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
