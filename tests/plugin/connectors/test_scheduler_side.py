"""What is looked up and what is written, with a scheduler's part played by the test."""

from types import SimpleNamespace

import pytest

from xquant_vllm.plugin.connectors.groups import PageGroup
from xquant_vllm.plugin.connectors.keys import TokenKeys
from xquant_vllm.plugin.connectors.page_files import PageFolder
from xquant_vllm.plugin.connectors.scheduler_side import SchedulerSide
from xquant_vllm.plugin.connectors.transfers import PageTransfers, RankPages

FULL, WINDOW, SMALL = PageGroup(4, None, ("a",)), PageGroup(4, 6, ("b",)), PageGroup(2, 6, ("c",))
RANK = RankPages(bytes(16), (8, 8))


def request(tokens, name="r", **more):
    fields = {
        "lora_request": None,
        "mm_features": [],
        "prompt_embeds": None,
        "prompt_is_token_ids": None,
        "resumable": False,
        "cache_salt": None,
        "skip_reading_prefix_cache": False,
        "num_computed_tokens": 0,
    }
    tokens = list(tokens)
    return SimpleNamespace(request_id=name, all_token_ids=tokens, num_tokens=len(tokens), **{**fields, **more})


class World:
    """Files, and a scheduler."""

    def __init__(self, root, groups=(FULL,), ranks=(RANK,), reads=True, writes=True):
        self.groups, self.root, self.ranks = groups, root, ranks
        self.side = SchedulerSide(root, groups, reads=reads, writes=writes)
        self.side.set_ranks(ranks)
        self.folders = [PageFolder(root, rank.fingerprint, rank.page_bytes) for rank in ranks]

    def put(self, tokens, group, block, *, ranks=None, salt=None):
        keys = TokenKeys(salt, min(of.block_size for of in self.groups))
        end = (block + 1) * self.groups[group].block_size
        keys.extend(list(tokens)[:end])
        for folder in self.folders if ranks is None else [self.folders[rank] for rank in ranks]:
            folder.write(group, keys.at(end), memoryview(bytes(8)))
        return keys.at(end)

    def step(self, scheduled, blocks) -> PageTransfers:
        state = SimpleNamespace(get_block_ids=lambda name: blocks[name])
        return self.side.transfers(SimpleNamespace(num_scheduled_tokens=scheduled, kv_connector_block_state=state))


@pytest.fixture
def world(tmp_path):
    return lambda *args, **more: World(tmp_path, *args, **more)


def test_the_longest_prefix_is_found_and_read(world):
    here, tokens = world(), range(100, 117)
    keys = [here.put(tokens, 0, block) for block in (0, 1, 2, 3)]
    one = request(tokens)
    here.side.add(one)
    # The last token is computed, so of 17 tokens 16 can be had, and of 16 only 12.
    assert here.side.more_tokens(one, 0) == 16
    assert here.side.more_tokens(request(tokens[:16]), 0) == 12
    assert here.side.more_tokens(one, 4) == 12
    here.side.allocated(one, [[7, 8, 9, 3, 0]], 12)
    here.side.allocated(one, [[7, 8, 9, 3, 0]], 0)
    loads = here.step({}, {}).loads
    assert loads == {"r": [(0, keys[1], 8), (0, keys[2], 9), (0, keys[3], 3)]}
    assert here.step({}, {}).loads == {}


def test_a_gap_ends_it(world):
    here, tokens = world(), range(30)
    for block in (0, 1, 3):
        here.put(tokens, 0, block)
    one = request(tokens)
    here.side.add(one)
    assert here.side.more_tokens(one, 0) == 8
    assert here.side.more_tokens(one, 8) == 0


def test_all_ranks_must_have_it(world):
    here, tokens = world(ranks=(RANK, RankPages(b"\1" * 16, (8, 8)))), range(30)
    here.put(tokens, 0, 0)
    here.put(tokens, 0, 1, ranks=[1])
    one = request(tokens)
    here.side.add(one)
    assert here.side.more_tokens(one, 0) == 4


def test_of_windows_the_last_blocks_suffice(world):
    here, tokens = world((FULL, WINDOW)), range(30)
    for block in range(5):
        here.put(tokens, 0, block)
    keys = [here.put(tokens, 1, block) for block in (2, 3)]
    one = request(tokens)
    here.side.add(one)
    # 20 tokens would need the window's block 4.
    assert here.side.more_tokens(one, 0) == 16
    here.side.allocated(one, [[11, 12, 13, 14, 15], [0, 0, 16, 17, 18]], 16)
    (pages,) = here.step({}, {}).loads.values()
    assert [page for page in pages if page.group == 1] == [(1, keys[0], 16), (1, keys[1], 17)]
    assert [page.block for page in pages if page.group == 0] == [11, 12, 13, 14]


def test_groups_may_have_blocks_of_other_sizes(world):
    here, tokens = world((FULL, SMALL)), range(30)
    for block in range(3):
        here.put(tokens, 0, block)
    for block in (1, 2, 3):
        here.put(tokens, 1, block)
    one = request(tokens)
    here.side.add(one)
    assert here.side.more_tokens(one, 0) == 8  # tokens 3 to 7 are seen by the next
    assert here.side.more_tokens(one, 2) == 0  # vLLM's own hit does not end where all blocks do


def test_what_more_than_tokens_decides_on_is_left_out(world):
    here, tokens = world(), range(9)
    here.put(tokens, 0, 0)
    other = [
        {"lora_request": object()},
        {"mm_features": [object()]},
        {"prompt_embeds": object()},
        {"prompt_is_token_ids": [True]},
        {"resumable": True},
    ]
    for number, more in enumerate(other):
        one = request(tokens, str(number), **more)
        here.side.add(one)
        assert here.side.more_tokens(one, 0) == 0
        assert here.step({one.request_id: 9}, {one.request_id: [[5, 6, 7]]}).saves == []
    plain = request(tokens)
    here.side.add(plain)
    assert here.side.more_tokens(plain, 0) == 4


def test_prompts_whose_logits_are_wanted_are_computed_and_written(world):
    here, tokens = world(), range(9)
    here.put(tokens, 0, 0)
    one = request(tokens, skip_reading_prefix_cache=True)
    here.side.add(one)
    assert here.side.more_tokens(one, 0) == 0
    assert len(here.step({"r": 9}, {"r": [[5, 6, 7]]}).saves) == 2


def test_salts_share_nothing(world):
    here, tokens = world(), range(9)
    here.put(tokens, 0, 0, salt="mine")
    for name, salt, found in (("a", None, 0), ("b", "mine", 4), ("c", "yours", 0)):
        one = request(tokens, name, cache_salt=salt)
        here.side.add(one)
        assert here.side.more_tokens(one, 0) == found


def test_blocks_are_written_once_they_are_whole(world):
    """A prompt in chunks, then decoding, with drafts that are not the request's yet."""
    here = world()
    one = request(range(10))
    here.side.add(one)
    blocks = {"r": [[5, 6, 7, 8]]}
    saved = []
    for scheduled, tokens in ((3, 10), (3, 10), (4, 10), (1, 11), (4, 12), (1, 13), (0, 13)):
        one.all_token_ids, one.num_tokens = list(range(tokens)), tokens
        step = here.step({"r": scheduled} if scheduled else {}, blocks)
        saved.append([page.block for page in step.saves])
        one.num_computed_tokens = min(one.num_computed_tokens + scheduled, tokens)
    assert saved == [[], [5], [6], [], [7], [], []]


def test_what_was_read_is_not_written_and_what_vllm_has_given_away_neither(world):
    here, tokens = world((FULL, WINDOW)), range(20)
    for block in (0, 1):
        here.put(tokens, 0, block)
        here.put(tokens, 1, block)
    one = request(tokens)
    here.side.add(one)
    assert here.side.more_tokens(one, 0) == 8
    here.side.allocated(one, [[3, 4], [0, 5]], 8)
    one.num_computed_tokens = 8
    saves = here.step({"r": 12}, {"r": [[3, 4, 6, 7, 8], [0, 0, 0, 9, 10]]}).saves
    assert [(page.group, page.block) for page in saves] == [(0, 6), (0, 7), (0, 8), (1, 9), (1, 10)]


def test_roles(world):
    tokens = range(9)
    producer, consumer = world(reads=False), world(writes=False)
    producer.put(tokens, 0, 0)
    for here, read, written in ((producer, 0, 2), (consumer, 4, 0)):
        one = request(tokens)
        here.side.add(one)
        assert here.side.more_tokens(one, 0) == read
        assert len(here.step({"r": 9}, {"r": [[5, 6, 7]]}).saves) == written


def test_a_request_with_a_bad_file_is_computed_and_written_anew(world):
    here, tokens = world(), range(9)
    for block in (0, 1):
        here.put(tokens, 0, block)
    one, other = request(tokens), request(tokens, "other")
    here.side.add(one)
    here.side.add(other)
    assert here.side.more_tokens(one, 0) == 8
    here.side.allocated(one, [[5, 6]], 8)
    here.side.failed(["r", "unknown"])
    assert here.side.more_tokens(one, 0) == 0
    assert here.side.more_tokens(other, 0) == 8
    assert [page.block for page in here.step({"r": 9}, {"r": [[7, 8, 9]]}).saves] == [7, 8]


def test_nothing_is_kept_of_a_request_that_has_ended(world):
    here = world()
    one = request(range(9))
    here.side.add(one)
    here.side.remove("r")
    here.side.remove("r")
    assert here.side.more_tokens(one, 0) == 0
    assert here.step({"r": 9}, {"r": [[5, 6, 7]]}).saves == []
