"""One instance's blocks: what is found, what is evicted first, what is not evicted."""

from xquant_vllm.planning.traces.block_cache import BlockCache

SIZE = 16


def through(cache, names, output=0, prompt=None):
    """A request from beginning to end; the tokens that it found."""
    held = cache.admit(names, len(names) * SIZE if prompt is None else prompt)
    cache.finish(held, output)
    return held.hit


def test_whole_prefixes_are_found_but_never_all_of_a_prompt():
    cache = BlockCache(10, SIZE)
    assert through(cache, "abc") == 0
    assert through(cache, "abd") == 2 * SIZE
    assert through(cache, "abc") == 2 * SIZE
    assert through(cache, "abc", prompt=3 * SIZE + 1) == 3 * SIZE
    assert through(cache, "xbc") == 0


def test_the_tail_of_what_was_used_least_recently_goes_first():
    cache = BlockCache(6, SIZE)
    through(cache, "abc")
    through(cache, "xyz")
    # Takes the room of c and b; a is still the beginning of something.
    through(cache, "12")
    assert cache.match("abc", 999) == 1
    assert cache.match("xyz", 999) == 3


def test_what_is_found_is_used_again():
    cache = BlockCache(6, SIZE)
    through(cache, "abc")
    through(cache, "xyz")
    through(cache, "abc", prompt=3 * SIZE + 1)
    through(cache, "123")
    assert cache.match("abc", 999) == 3
    assert cache.match("xyz", 999) == 0


def test_blocks_in_use_stay_and_requests_wait_for_room():
    cache = BlockCache(4, SIZE)
    first = cache.admit("abc", 3 * SIZE)
    assert cache.admit("xy", 2 * SIZE) is None
    # A block that both use needs no room.
    second = cache.admit("ab", 2 * SIZE + 1)
    assert second.hit == 2 * SIZE
    cache.finish(first, 0)
    assert cache.match("abc", 999) == 3
    assert cache.admit("xyz", 3 * SIZE) is None
    cache.finish(second, 0)
    assert cache.admit("xyz", 3 * SIZE).hit == 0


def test_answers_take_room_and_are_found_by_their_names_only():
    cache = BlockCache(4, SIZE)
    held = cache.admit("a", SIZE + 3)
    cache.finish(held, 2 * SIZE, answers=["b"])
    assert cache.match("ab?", 999) == 2
    assert through(cache, "xyz") == 0
    assert cache.match("ab", 999) == 1


def test_any_number_of_blocks():
    cache = BlockCache(None, SIZE)
    for number in range(1000):
        through(cache, [number, "b"], output=100)
    assert cache.match([0, "b"], 999) == 2
