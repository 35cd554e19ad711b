"""How contexts pass through the workspace. No kernel runs."""

import random
from itertools import pairwise

import pytest

from xquant_vllm.attention.gpu.prefill.spans import rounds


def test_rounds() -> None:
    found = rounds([(0, 0, 5, 5), (2, 10, 40, 30), (3, 0, 6, 0)], 16)
    assert all(sum(span.stop - span.begin for span in spans) <= 16 for spans in found)
    whole = [span for spans in found for span in spans]
    for sequence, oldest, length in ((0, 0, 5), (2, 10, 40), (3, 0, 6)):
        own = [span for span in whole if span.sequence == sequence]
        assert own[0].begin == oldest
        assert own[-1].stop == length
        assert [span.first for span in own] == [True] + [False] * (len(own) - 1)
        assert [span.last for span in own] == [False] * (len(own) - 1) + [True]
        assert all(before.stop == after.begin for before, after in pairwise(own))
    assert {(span.sequence, span.exact) for span in whole} == {(0, 5), (2, 30), (3, 0)}


@pytest.mark.parametrize("seed", range(8))
def test_random_rounds(seed: int) -> None:
    """Every round fits, spans do not overlap, and together they are the contexts in order. What fits is whole."""
    choose = random.Random(seed)
    room = choose.choice((16, 50, 100))
    contexts = []
    for sequence in range(choose.randint(1, 6)):
        oldest = choose.randint(0, 40)
        length = oldest + choose.randint(1, 200)
        contexts.append((sequence, oldest, length, choose.randint(oldest, length)))
    found = rounds(contexts, room)
    for spans in found:
        assert [span.offset for span in spans] == [
            sum(before.stop - before.begin for before in spans[:index]) for index in range(len(spans))
        ]
        assert spans[-1].offset + spans[-1].stop - spans[-1].begin <= room
        assert len(spans) == 1 or all(span.first and span.last for span in spans)
    lengths = {sequence: length - oldest for sequence, oldest, length, _ in contexts}
    for sequence, length in lengths.items():
        assert sum(span.sequence == sequence for spans in found for span in spans) == -(-length // room)
    passed = [
        (span.sequence, at, span.exact) for spans in found for span in spans for at in range(span.begin, span.stop)
    ]
    assert passed == [
        (sequence, at, exact) for sequence, oldest, length, exact in contexts for at in range(oldest, length)
    ]


def test_rounds_are_full() -> None:
    """A sequence joins the round before if it fits."""
    assert [len(spans) for spans in rounds([(of, 0, 5, 5) for of in range(7)], 16)] == [3, 3, 1]
