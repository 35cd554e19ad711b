"""The doctor's attention: right kernels pass, wrong ones do not."""

import pytest
import torch

from tests.cpu_kernels import has_kernels
from xquant_vllm.attention import reference
from xquant_vllm.diagnosis.attention_check import check_attention

OPERATIONS = ["store", "decode", "prefill", "decode", "prefill"]


class Changed:
    """The reference with something changed."""

    def __init__(self, store=None, attention=None):
        self._store, self._attention = store, attention

    def store(self, pages, plan, slots, inputs):
        reference.store(pages, plan, slots, inputs)
        if self._store:
            self._store(pages[0])

    def paged_attention(self, query, pages, plan, batch, output, inputs=None):
        reference.paged_attention(query, pages, plan, batch, output, inputs)
        if self._attention:
            self._attention(output)


def test_the_reference_agrees_with_itself():
    results = check_attention(reference, "cpu")
    assert [result["operation"] for result in results] == OPERATIONS
    assert [result["dtype"] for result in results] == ["float32"] * 3 + ["bfloat16"] * 2
    assert all(result["passed"] for result in results)
    assert all(result["error"] < 1e-6 for result in results[:3])


@pytest.mark.skipif(not has_kernels(), reason="no kernels")
def test_every_instruction_set_passes(isa):
    from xquant_vllm.attention.cpu import kernels

    results = check_attention(kernels, "cpu")
    assert [result for result in results if not result["passed"]] == []
    # There is room, and not too much of it: an error is 1 where a kernel is wrong.
    assert all(result["error"] < 0.7 * result["bound"] for result in results)


def negate(output):
    output.neg_()


def forget_a_row(output):
    output[-1, 2] = torch.nan


def spoil_a_channel(output):
    output[0, 0, 3] += output[0, 0].abs().max() * 0.1


@pytest.mark.parametrize("change", [negate, forget_a_row, spoil_a_channel])
def test_a_wrong_attention_does_not(change):
    results = check_attention(Changed(attention=change), "cpu")
    assert results[0]["passed"]
    assert not all(result["passed"] for result in results)


def test_wrong_pages_do_not():
    def spoil(pages):
        pages[2] ^= 0x11

    results = check_attention(Changed(store=spoil), "cpu")
    assert not results[0]["passed"]
