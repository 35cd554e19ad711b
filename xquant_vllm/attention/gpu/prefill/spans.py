"""How the cached tokens of prefilling sequences pass through a workspace of bounded size."""

from collections.abc import Sequence
from dataclasses import dataclass

# Columns of a span's description to a kernel: its attributes, in their order.
SPAN_FIELDS = ("sequence", "begin", "stop", "offset", "first", "last", "exact")


@dataclass(frozen=True)
class Span:
    """Neighbouring cached tokens of one sequence that are in the workspace at the same time.

    Attributes:
        sequence: index of the sequence.
        begin: position of its first token.
        stop: position after its last.
        offset: where in the workspace, in tokens.
        first: whether no span of this sequence came before.
        last: whether none follows.
        exact: from which position on tokens are those of the step itself, attended to as they were computed; behind
            all of them if none is.
    """

    sequence: int
    begin: int
    stop: int
    offset: int
    first: bool
    last: bool
    exact: int


def rounds(contexts: Sequence[tuple[int, int, int, int]], room: int) -> list[list[Span]]:
    """Pack contexts into rounds through the workspace, in order.

    Contexts that fit share rounds and are never cut, so that a library can attend to a round. A longer one has rounds
    of its own.

    Args:
        contexts: of every sequence its index, the oldest position that it attends to, its length, and the first exact
            position.
        room: tokens of the workspace.

    Returns:
        The spans of every round; together they have at most ``room`` tokens.
    """
    result: list[list[Span]] = []
    free = 0
    for sequence, oldest, length, exact in contexts:
        if length - oldest > free:
            free = 0
        begin = oldest
        while begin < length:
            if not free:
                result.append([])
                free = room
            stop = min(length, begin + free)
            result[-1].append(Span(sequence, begin, stop, room - free, begin == oldest, stop == length, exact))
            free -= stop - begin
            begin = stop
        if length - oldest > room:
            free = 0
    return result
