"""A trace on instances: hits, routes, waiting, and tokens under way."""

import random

import pytest

from xquant_vllm.planning.traces.replay import Rates, peak_tokens, replay
from xquant_vllm.planning.traces.requests import Trace, TracedRequest

SIZE = 16


def trace_of(*prompts, timed=True, every=1000.0, output=0):
    requests = [
        TracedRequest(number * every, len(names) * SIZE, output, tuple(names)) for number, names in enumerate(prompts)
    ]
    return Trace("test", SIZE, timed, tuple(requests))


def users(count, turns, seed=0):
    """Histories that grow by two blocks a turn, in random order."""
    drawn = random.Random(seed)
    order = [user for user in range(count) for _ in range(turns)]
    drawn.shuffle(order)
    lengths = dict.fromkeys(range(count), 2)
    prompts = []
    for user in order:
        lengths[user] += 2
        prompts.append([(user, block) for block in range(lengths[user])])
    return trace_of(*prompts)


def test_hits_are_shares_of_prompts():
    found = replay(trace_of("abcd", "abxy", "abcd"), 100 * SIZE)
    assert found.hit_tokens == (2 + 3) * SIZE
    assert found.hit_rate == pytest.approx(5 / 12)
    assert found.prefilled == 7 * SIZE


def test_larger_caches_find_more_up_to_what_there_is():
    trace = users(30, 6)
    rates = [replay(trace, tokens).hit_rate for tokens in (400, 1600, 6400, None)]
    assert rates == sorted(rates)
    assert rates[0] < 0.2 < rates[-1]


def test_requests_that_do_not_fit_are_counted_and_left_out():
    found = replay(trace_of("abcdef", "ab"), 4 * SIZE)
    assert found.refused == 1
    assert found.prompt_tokens == 2 * SIZE


def test_requests_wait_for_those_before_them():
    trace = trace_of("abc", "xyz", every=0.0, output=SIZE)
    found = replay(trace, 4 * SIZE)
    assert (found.waited, found.refused) == (1, 0)
    assert found.prompt_tokens == 6 * SIZE
    assert replay(trace, 8 * SIZE).waited == 0


def test_so_many_run_at_once():
    trace = trace_of("ab", "cd", "ef", every=0.0, output=SIZE)
    assert replay(trace, None, rates=Rates(at_once=2)).waited == 1
    assert replay(trace, None, rates=Rates(at_once=2)).prompt_tokens == 6 * SIZE
    assert replay(trace, None).waited == 0


def test_a_router_sends_users_where_their_history_is():
    trace = users(40, 6)
    alone = replay(trace, None).hit_rate
    assert replay(trace, None, instances=4).hit_rate > 0.95 * alone


def test_a_common_beginning_does_not_draw_all_requests_to_one_instance():
    prompts = [["system", f"{number}a", f"{number}b"] for number in range(200)]
    trace = trace_of(*prompts)
    # One instance would hold everything; four of them a quarter each.
    assert replay(trace, 160 * SIZE, instances=4).hit_tokens >= 196 * SIZE


def test_without_times_requests_come_one_after_another():
    trace = trace_of("abc", "abc", timed=False, every=0.0)
    assert replay(trace, 4 * SIZE).waited == 0
    assert peak_tokens(trace) == 3 * SIZE


def test_tokens_under_way():
    rates = Rates(prefill=SIZE, decode=1)
    trace = trace_of("ab", "cd", "ef", every=3.0, output=2)
    # Each takes 2 s for its prompt and 2 s for its answer.
    assert peak_tokens(trace, rates) == 2 * (2 * SIZE + 2)
    assert peak_tokens(trace_of("ab", "cd", every=10.0, output=2), rates) == 2 * SIZE + 2
