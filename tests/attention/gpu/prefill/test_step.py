"""What is made of a batch once for all layers that prefill, and sent to the device in one copy. No kernel runs."""

import random

import pytest
import torch

from tests.attention.attention_cases import Spec, make_plan
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu import staging
from xquant_vllm.attention.gpu.prefill.spans import SPAN_FIELDS, rounds
from xquant_vllm.attention.gpu.prefill.step import PrefillStep, PrefillSteps, View, contexts

CPU = torch.device("cpu")


def batch_of(lengths: list[tuple[int, int]], decode_tokens: int = 1) -> AttentionBatch:
    starts = torch.tensor([0, *(query_len for query_len, _ in lengths)]).cumsum(0).int()
    seq_lens = torch.tensor([seq_len for _, seq_len in lengths], dtype=torch.int32)
    return AttentionBatch(
        starts, seq_lens, torch.zeros(len(lengths), 1), lengths=tuple(lengths), decode_tokens=decode_tokens
    )


@pytest.fixture
def sent(monkeypatch):
    """What is sent to a device."""
    calls, send = [], staging.send
    monkeypatch.setattr(staging, "send", lambda numbers, device: calls.append(numbers) or send(numbers, device))
    return calls


@pytest.mark.parametrize("seed", range(8))
def test_random_steps(seed: int, sent) -> None:
    """Every view has the rounds that its spans say; libraries get the same sequences; one copy holds all of it."""
    choose = random.Random(seed)
    lengths = []
    for _ in range(choose.randint(1, 9)):
        query_len = choose.choice((0, 1, 1, 3, choose.randint(4, 60)))
        # Of a sequence that another call attends for, nothing is there.
        lengths.append((query_len, choose.choice((0, query_len, query_len + choose.randint(0, 90)))))
    batch = batch_of(lengths, decode_tokens=choose.choice((1, 3)))
    room = choose.choice((16, 70, 1000))
    views = [View(None, None), View(7, None), View(None, 5), View(20, 5)]
    step = PrefillStep(batch, views, room)
    of_views = {view: rounds(contexts(lengths, batch.decode_tokens, view), room) for view in views}
    assert len(sent) == (1 if any(of_views.values()) else 0)
    for view, expected in of_views.items():
        assert len(step.rounds(view)) == len(expected)
        for part, spans in zip(step.rounds(view), expected, strict=True):
            assert part.spans.tolist() == [[int(getattr(span, name)) for name in SPAN_FIELDS] for span in spans]
            assert part.spans.data_ptr() % 16 == 0
            assert part.longest == max(span.stop - span.begin for span in spans)
            assert part.longest_exact == max(len(range(max(span.begin, span.exact), span.stop)) for span in spans)
            assert part.longest_query == max(lengths[span.sequence][0] for span in spans)
            assert (part.whole is not None) == all(span.first and span.last for span in spans)
            if part.whole is None:
                continue
            queries, keys = part.whole.sequences.query_starts.tolist(), part.whole.sequences.key_starts.tolist()
            found = {
                part.whole.tokens.start + start: (stop - start, first_key, last_key - first_key)
                for start, stop, first_key, last_key in zip(queries, queries[1:], keys, keys[1:], strict=False)
            }
            assert part.whole.tokens.stop == part.whole.tokens.start + queries[-1]
            assert part.whole.keys == keys[-1]
            starts = batch.query_start_loc.tolist()
            for span in spans:
                attended = (lengths[span.sequence][0], span.offset, span.stop - span.begin)
                assert found.pop(starts[span.sequence]) == attended
            assert all(key_len == 0 for _, _, key_len in found.values())


def test_a_step_of_layers(sent) -> None:
    """Layers that differ in windows alone share what they can; those that differ in nothing have one view."""
    plans = [make_plan(Spec(kv_heads=2, window=window)) for window in (None, 9, None, 9)]
    steps = PrefillSteps(plans)
    step = steps.make(batch_of([(1, 40), (30, 50)]))
    assert step is not None
    assert len(sent) == 1
    assert [part.longest for plan in plans for part in step.rounds(View.of(plan))] == [50, 38, 50, 38]
    assert steps.make(AttentionBatch(torch.arange(3), torch.ones(2), torch.zeros(2, 1), 1)) is None
    assert steps.make(batch_of([(1, 40), (1, 50)])).rounds(View(9, None)) == ()
    assert len(sent) == 1


class Copying:
    """Of the event behind a copy that is under way."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def record(self, stream) -> None:
        self.done = False


def test_nothing_is_written_over_a_copy_under_way(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    on_the_way = staging.Staging(CPU)
    on_the_way.send([1, 2, 3])
    (first,) = on_the_way._buffers
    first.copied = Copying()
    on_the_way.send([4, 5])
    assert len(on_the_way._buffers) == 2
    assert first.numbers[:3].tolist() == [1, 2, 3]
    first.copied.done = True
    on_the_way.send([6])
    assert first.numbers[:3].tolist() == [6, 2, 3]
    assert not first.copied.done
    assert len(on_the_way._buffers) == 2


def test_what_was_sent_stays() -> None:
    """Memory of the host is used again; that of the device is each step's own. A longer table gets more memory."""
    on_the_way = staging.Staging(CPU)
    with torch.inference_mode():
        on_the_way.send([1])
    steps = [on_the_way.send([number] * count) for number, count in enumerate((3, 5, 5000, 2))]
    assert [of.tolist() for of in steps] == [[0] * 3, [1] * 5, [2] * 5000, [3] * 2]
    assert [of.numbers.numel() for of in on_the_way._buffers] == [8192]
