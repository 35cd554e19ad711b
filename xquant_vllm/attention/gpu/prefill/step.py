"""What the layers of a step have in common when they prefill: made once, sent to the device in one copy.

Layers read the same sequences. What they do with them differs in what :class:`View` says, so a step holds the rounds of
every view that occurs among its layers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from xquant_vllm.attention.batch import AttentionBatch, WholeSequences
from xquant_vllm.attention.gpu import staging
from xquant_vllm.attention.gpu.prefill.spans import SPAN_FIELDS, Span, rounds
from xquant_vllm.attention.plan import AttentionLayerPlan

# Cached tokens in the workspace at a time.
ROOM = 16384
# Numbers of 4 bytes between tables: kernels are compiled once for addresses that are multiples of 16 bytes.
_ALIGNED = 4


class View(NamedTuple):
    """What of a layer decides how a batch prefills."""

    window: int | None
    exact_from: int | None

    @classmethod
    def of(cls, plan: AttentionLayerPlan) -> "View":
        """Of a layer."""
        return cls(plan.sliding_window, plan.exact_from)


@dataclass(frozen=True)
class WholeRound:
    """A round as a library takes it.

    Attributes:
        tokens: which query tokens its sequences have.
        keys: how many of the workspace's tokens they attend to.
        sequences: the sequences.
    """

    tokens: slice
    keys: int
    sequences: WholeSequences


@dataclass(frozen=True)
class Round:
    """What is in the workspace at the same time.

    Attributes:
        spans: ``[spans, len(SPAN_FIELDS)]`` int32, on the device.
        longest: tokens of a span at most.
        longest_exact: exact tokens of a span at most.
        longest_query: query tokens of one of its sequences at most.
        whole: the round as a library takes it; None if it has parts of sequences.
    """

    spans: torch.Tensor
    longest: int
    longest_exact: int
    longest_query: int
    whole: WholeRound | None


class PrefillStep:
    """The rounds of a step, by view."""

    def __init__(self, batch: AttentionBatch, views: Iterable[View], room: int = ROOM) -> None:
        """Make them; the step does not hold the batch.

        Args:
            batch: the sequences, with ``lengths`` unless none prefills.
            views: of the layers.
            room: tokens of the workspace.
        """
        packed = _Packed()
        drafts = {view: _drafts(batch, view, room, packed) for view in set(views)}
        self._rounds: dict[View, tuple[Round, ...]] = dict.fromkeys(drafts, ())
        if packed.numbers:
            numbers = staging.send(packed.numbers, batch.seq_lens.device)
            self._rounds = {view: tuple(on(numbers) for on in of_view) for view, of_view in drafts.items()}

    def rounds(self, view: View) -> Sequence[Round]:
        """What goes through the workspace, in order."""
        return self._rounds[view]


class PrefillSteps:
    """Makes the step of every batch for some layers, of which it holds nothing but the views."""

    def __init__(self, plans: Iterable[AttentionLayerPlan], room: int = ROOM) -> None:
        """Note the views.

        Args:
            plans: of the layers.
            room: tokens of the workspace.
        """
        self._views, self._room = frozenset(map(View.of, plans)), room

    def make(self, batch: AttentionBatch) -> PrefillStep | None:
        """The step of a batch; None where the host knows of no sequence that prefills."""
        return None if batch.lengths is None else PrefillStep(batch, self._views, self._room)


def contexts(lengths: Sequence[tuple[int, int]], decode_tokens: int, view: View) -> list[tuple[int, int, int, int]]:
    """What :func:`rounds` packs: what the sequences that prefill attend to.

    Args:
        lengths: of every sequence its query tokens and its cached tokens.
        decode_tokens: see :class:`AttentionBatch`.
        view: of the layer.
    """
    result = []
    for sequence, (query_len, seq_len) in enumerate(lengths):
        if query_len > decode_tokens and seq_len:
            oldest = max(0, seq_len - query_len - view.window + 1) if view.window else 0
            is_exact = view.exact_from is not None and query_len >= view.exact_from
            result.append((sequence, oldest, seq_len, seq_len - query_len if is_exact else seq_len))
    return result


class _Packed:
    """Tables of numbers, side by side."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def add(self, table: Iterable[int]) -> slice:
        """Where the table will be."""
        self.numbers += [0] * (-len(self.numbers) % _ALIGNED)
        start = len(self.numbers)
        self.numbers += table
        return slice(start, len(self.numbers))


Draft = Callable[[torch.Tensor], Round]
"""A round whose tables are not on the device yet, of the tensor that they will be parts of."""


def _drafts(batch: AttentionBatch, view: View, room: int, packed: _Packed) -> list[Draft]:
    lengths = batch.lengths or ()
    return [_draft(spans, lengths, packed) for spans in rounds(contexts(lengths, batch.decode_tokens, view), room)]


def _draft(spans: Sequence[Span], lengths: Sequence[tuple[int, int]], packed: _Packed) -> Draft:
    described = packed.add(int(getattr(span, name)) for span in spans for name in SPAN_FIELDS)
    longest = max(span.stop - span.begin for span in spans)
    longest_exact = max(max(0, span.stop - max(span.begin, span.exact)) for span in spans)
    longest_query = max(lengths[span.sequence][0] for span in spans)
    are_whole = all(span.first and span.last for span in spans)
    whole = _draft_whole(spans, lengths, packed) if are_whole else None

    def on(numbers: torch.Tensor) -> Round:
        return Round(
            numbers[described].view(-1, len(SPAN_FIELDS)),
            longest,
            longest_exact,
            longest_query,
            None if whole is None else whole(numbers),
        )

    return on


def _draft_whole(
    spans: Sequence[Span], lengths: Sequence[tuple[int, int]], packed: _Packed
) -> Callable[[torch.Tensor], WholeRound]:
    keys = {span.sequence: span.stop - span.begin for span in spans}
    first, last = spans[0].sequence, spans[-1].sequence
    # With those between them that decode or are hot, and attend to nothing here: their queries lie between the others'.
    asking = [sequence for sequence in range(first, last + 1) if lengths[sequence][0]]
    query_lens = tuple(lengths[sequence][0] for sequence in asking)
    key_lens = tuple(keys.get(sequence, 0) for sequence in asking)
    begin = sum(query_len for query_len, _ in lengths[:first])
    query_starts, key_starts = (packed.add(accumulate(of, initial=0)) for of in (query_lens, key_lens))

    def on(numbers: torch.Tensor) -> WholeRound:
        sequences = WholeSequences(numbers[query_starts], numbers[key_starts], query_lens, key_lens)
        return WholeRound(slice(begin, begin + sum(query_lens)), sum(key_lens), sequences)

    return on
