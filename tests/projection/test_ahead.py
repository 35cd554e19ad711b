"""Layers computed ahead: in order, side by side, no more of them than needed, and failures where they belong."""

import threading

import pytest
import torch

from xquant_vllm.projection.ahead import AheadPool


def test_results_come_in_order_and_only_few_are_held():
    started = []
    with AheadPool(lambda item: started.append(item) or item * item) as pool:
        pool.announce(range(100))
        for item in range(100):
            assert pool.take(item) == item * item
            assert len(started) <= item + 2 + 8 + 1
    assert sorted(started) == list(range(100))


def test_an_item_taken_out_of_turn_is_computed_once():
    started = []
    with AheadPool(lambda item: started.append(item) or item) as pool:
        pool.announce(range(50))
        assert pool.take(49) == 49
        assert [pool.take(item) for item in range(49)] == list(range(49))
    assert sorted(started) == list(range(50))


def test_work_is_done_by_other_threads_and_torch_computes_with_one():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with AheadPool(lambda _: (threading.get_ident(), torch.get_num_threads())) as pool:
        pool.announce([0])
        thread, inside = pool.take(0)
    assert thread != threading.get_ident()
    assert inside == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_failure_reaches_who_asked():
    with AheadPool(lambda item: 1 // item) as pool:
        pool.announce([1, 0])
        assert pool.take(1) == 1
        with pytest.raises(ZeroDivisionError):
            pool.take(0)
