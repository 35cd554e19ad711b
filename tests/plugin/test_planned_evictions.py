"""The plan's cache of blocks finds and evicts what vLLM's own manager does, request by request."""

import random

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from xquant_vllm.planning.traces.block_cache import BlockCache
from xquant_vllm.planning.traces.request_log import block_names

SIZE, BLOCKS = 16, 61


class Vllm:
    """vLLM's manager, used as its scheduler uses it."""

    def __init__(self) -> None:
        init_none_hash(sha256)
        spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
        # One block is nobody's.
        config = KVCacheConfig(BLOCKS + 1, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(config, 10_000, scheduler_block_size=SIZE, hash_block_size=SIZE)
        self.hasher = get_request_block_hasher(SIZE, sha256)

    def admit(self, name: str, prompt: list[int]):
        """The request and the tokens that were found; None without room."""
        request = Request(name, prompt, SamplingParams(max_tokens=999), None, block_hasher=self.hasher)
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        if self.manager.allocate_slots(request, len(prompt) - hit, hit, blocks) is None:
            return None
        request.num_computed_tokens = len(prompt)
        return request, hit

    def finish(self, request, answer: list[int]) -> None:
        for token in answer:
            request.append_output_token_ids(token)
            assert self.manager.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1
        self.manager.free(request)


def prompts(drawn: random.Random, count: int) -> list[list[int]]:
    """Prompts that begin alike: histories that grow, and forks of them."""
    histories = [[drawn.randrange(999) for _ in range(40)] for _ in range(3)]
    made = []
    for _ in range(count):
        history = drawn.choice(histories)
        cut = drawn.choice([len(history), drawn.randrange(1, len(history) + 1)])
        prompt = history[:cut] + [drawn.randrange(999) for _ in range(drawn.choice([0, 5, 16, 40]))]
        if len(prompt) < 300:
            histories.append(prompt)
        made.append(prompt)
    return made


@pytest.mark.parametrize("running", [1, 3, 30])
@pytest.mark.parametrize("seed", range(4))
def test_hits_are_vllms_whatever_is_running(seed, running):
    """Answers end within a block or fill some; several requests hold blocks at the same time."""
    drawn = random.Random(seed)
    ours, theirs = BlockCache(BLOCKS, SIZE), Vllm()
    under_way = []
    hits = evictions = full = 0
    for number, prompt in enumerate(prompts(drawn, 400)):
        names = block_names(prompt, SIZE)
        while True:
            held, admitted = ours.admit(names, len(prompt)), theirs.admit(str(number), prompt)
            assert (held is None) == (admitted is None)
            if held is not None:
                break
            full += 1
            end(under_way, 0, ours, theirs)
        request, hit = admitted
        assert held.hit == hit, number
        hits += hit > 0
        evictions += 0 < hit < len(prompt) - SIZE
        under_way.append((held, request, prompt, [drawn.randrange(999) for _ in range(drawn.choice([0, 1, 3]))]))
        if len(under_way) >= running:
            end(under_way, drawn.randrange(len(under_way)), ours, theirs)
    assert hits > 100
    assert evictions
    assert full or running < 30


def end(under_way, which, ours, theirs) -> None:
    held, request, prompt, answer = under_way.pop(which)
    # As many blocks as are free at the time: an engine would preempt another request for more.
    if theirs.manager.block_pool.get_num_free_blocks() == 0:
        answer = []
    theirs.finish(request, answer)
    ours.finish(held, len(answer), block_names(prompt + answer, SIZE)[len(prompt) // SIZE :])
