"""Bits as rows of characters."""

from xquant_vllm.diagnosis.factors.picture import _BLOCKS, _PLAIN, bars


def test_a_mark_is_a_number_of_bits():
    assert bars([0, 1, 2, 3, 4, 5, 6, 7, 8, 16], _PLAIN) == "012345678+"
    assert len(_BLOCKS) == len(_PLAIN) == 10


def test_wide_latents_are_drawn_in_32_marks():
    assert bars([8.0] * 64 + [2.0] * 64, _PLAIN) == "8" * 16 + "2" * 16
    assert len(bars([4.0] * 1000, _BLOCKS)) == 32
    assert len(bars([4.0] * 33, _BLOCKS)) == 32
    assert bars([16.0] + [4.0] * 63, _PLAIN)[0] == "+"
