"""Windows: where they start, how they open, and texts that are too short."""

import pytest

from tests.factorizing import FakeTokenizer
from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.tasks.windows import cut_windows

TEXT = " ".join("x" * (i % 90) + "y" for i in range(500))
IDS = FakeTokenizer().encode(TEXT, add_special_tokens=False)


class WithoutOpening(FakeTokenizer):
    """Begins texts with nothing."""

    def encode(self, text, add_special_tokens=True, verbose=True):
        return super().encode(text, add_special_tokens=False)


def test_windows_start_at_every_stride():
    windows = cut_windows(WithoutOpening(), TEXT, "text", 100, 3, 60)
    assert windows.tolist() == [IDS[start : start + 100] for start in (0, 60, 120)]


def test_every_window_opens_as_the_tokenizer_opens_a_text():
    windows = cut_windows(FakeTokenizer(), TEXT, "text", 100, 3, 100)
    assert windows.tolist() == [[1, *IDS[start : start + 99]] for start in (0, 100, 200)]


@pytest.mark.parametrize(
    ("window", "windows", "stride", "named"),
    [
        (100, 6, 100, "the text book has 500 tokens, but 6 windows of 100 tokens every 100 need 599; set --windows 5,"),
        (900, 3, 900, "need 2699; set --windows 1 and --window 501, or give a longer text"),
        (1, 3, 1, "--window 1 cannot work; set 2 or more"),
        (100, 0, 100, "--windows 0 cannot work; set 1 or more"),
        (100, 3, 0, "--stride 0 cannot work; set 1 or more"),
    ],
)
def test_what_cannot_be_cut_is_refused(window, windows, stride, named):
    with pytest.raises(RefusedError, match=named):
        cut_windows(FakeTokenizer(), TEXT, "book", window, windows, stride)


def test_what_is_proposed_works():
    assert cut_windows(FakeTokenizer(), TEXT, "book", 100, 5, 100).shape == (5, 100)
    assert cut_windows(FakeTokenizer(), TEXT, "book", 501, 1, 501).shape == (1, 501)


def test_an_empty_text_is_refused():
    with pytest.raises(RefusedError, match=r"has 0 tokens.*; give a longer text$"):
        cut_windows(FakeTokenizer(), "", "book", 100, 1, 100)
