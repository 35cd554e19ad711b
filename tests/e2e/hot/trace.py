"""Random traces through a running engine, and the check that hot blocks hold what the pages say.

Imported by the engine's process (`engine_process.py`), not by tests.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

VOCABULARY = range(3, 300)
LOGITS = 8
# In a trace of some hundred steps blocks are idle for less long than in a server's life, and prefixes are shorter.
_IDLE_STEPS, _PROMOTED_TOKENS = 6, 48
# A hot block that once differs from its page does so until it is taken away.
_CHECKED_EVERY = 4
# Decimals that products in another order may change, in units in the last place of a head's largest number.
_ULPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Watch:
    """Remembers which tokens of which blocks are written, as the plans of steps say."""

    def __init__(self) -> None:
        from xquant_vllm.attention.hot.policy import HotMap

        self._class, self._plan = HotMap, HotMap.plan
        self.written: dict[int, dict[int, tuple[int, int]]] = {}

    def __enter__(self) -> "Watch":
        def plan(hot_map, block_table, seq_lens, query_lens, *rest):
            hot_map._idle = _IDLE_STEPS
            hot_map._idle_limits, hot_map._promoted_tokens = (_IDLE_STEPS, _IDLE_STEPS), _PROMOTED_TOKENS
            step = self._plan(hot_map, block_table, seq_lens, query_lens, *rest)
            size, found = hot_map.block_size, {}
            for row in np.flatnonzero(query_lens):
                computed = int(seq_lens[row] - query_lens[row])
                first = 0 if hot_map.window is None else max(0, computed - hot_map.window + 1) // size
                for column in range(first, -(-int(seq_lens[row]) // size)):
                    block, count = int(block_table[row, column]), min(size, int(seq_lens[row]) - column * size)
                    if block:
                        # A block that several rows have is full; one that was given away begins anew.
                        found[block] = max(found.get(block, (0, 0)), (count, column))
            # Groups of layers share their memory: a block that this one writes has nothing of another any more.
            for other in self.written.values():
                for block in found:
                    other.pop(block, None)
            self.written.setdefault(id(hot_map), {}).update(found)
            return step

        self._class.plan = plan
        return self

    def __exit__(self, *_: object) -> None:
        self._class.plan = self._plan

    def hot_tokens(self, hot_map: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slots, positions and hot slots of all written tokens in hot blocks."""
        size, slots, positions, hot_slots = hot_map.block_size, [], [], []
        for block, (count, column) in self.written.get(id(hot_map), {}).items():
            hot = int(hot_map.hot_of(np.array([block]))[0])
            if hot:
                offsets = range(count)
                slots += [block * size + offset for offset in offsets]
                positions += [column * size + offset for offset in offsets]
                hot_slots += [hot * size + offset for offset in offsets]
        return tuple(torch.tensor(numbers, dtype=torch.int64) for numbers in (slots, positions, hot_slots))


def _hot_groups(llm: Any) -> Iterator[tuple[Any, list[str]]]:
    """Maps, and the layers that they are for."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    for groups in runner.attn_groups:
        for group in groups:
            builder = group.get_metadata_builder()._hot
            if builder is not None and builder.hot_map is not None:
                yield builder.hot_map, group.layer_names


def _counts(llm: Any) -> dict[str, int]:
    """Of all maps together."""
    counts = [of.counts for of in {id(hot_map): hot_map for hot_map, _ in _hot_groups(llm)}.values()]
    names = ("hot_rows", "cold_rows", "promoted_tokens", "new_tokens")
    return {name: sum(getattr(of, name) for of in counts) for name in names}


class Coherence:
    """Compares the pools of all layers with their pages."""

    def __init__(self, llm: Any, watch: Watch) -> None:
        config = llm.llm_engine.vllm_config
        self._layers = config.compilation_config.static_forward_context
        self._dtype = config.model_config.dtype
        self._llm, self._watch = llm, watch
        self.checked = self.exact = 0
        self.worst = 0.0

    def check(self) -> None:
        """All layers, all written tokens of hot blocks; adds to ``checked``, ``exact`` and ``worst``."""
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        from xquant_vllm.attention.hot import reference
        from xquant_vllm.attention.hot.rematerialize import rematerialize
        from xquant_vllm.attention.hot.tokens import HotTokens

        for hot_map, names in _hot_groups(self._llm):
            slots, positions, hot_slots = self._watch.hot_tokens(hot_map)
            if not len(slots):
                continue
            for name in names:
                attention = self._layers[name]
                impl, pool = attention.impl, attention.impl.hot_pool
                plan = impl.plan(hot_map.block_size)
                pages = impl._pages(attention.kv_cache)
                tokens = HotTokens(slots, positions, hot_slots)
                ours = rematerialize(reference, pages, plan, tokens, self._dtype)
                # CPU_ATTN keeps keys in an order of its own: written over a copy, the same numbers change nothing.
                isa = _get_attn_isa(self._dtype, hot_map.block_size, impl.head_size)
                memory = torch.cat((pool.keys, pool.values), 2)
                copies = memory.clone().chunk(2, 2)
                ops.cpu_attn_reshape_and_cache(*ours, *copies, hot_slots, isa)
                for kept, copy, numbers in zip((pool.keys, pool.values), copies, ours, strict=True):
                    assert torch.isfinite(kept).all()
                    off = (kept.float() - copy.float()).abs()
                    unit = _ULPS[self._dtype] * numbers.float().abs().amax()
                    self.worst = max(self.worst, float(off.max() / unit))
                    self.exact += int((off == 0).sum()) - (off.numel() - numbers.numel())
                    self.checked += numbers.numel()


def run_trace(llm: Any, seed: int, steps: int, repeats: bool = False) -> dict[str, Any]:
    """Add, advance and abort random requests; every few steps compare all that is hot with the pages.

    Args:
        llm: the engine, in this process.
        seed: of the trace.
        steps: with new requests; those that are left then are finished.
        repeats: prompts repeat themselves, so that some drafts are accepted.
    """
    from vllm import SamplingParams

    choose, engine = random.Random(seed), llm.llm_engine
    prefixes = [choose.choices(VOCABULARY, k=length) for length in (40, 96, 150, 150)]
    aborts: dict[str, int] = {}
    answers: dict[str, Any] = {}
    cached: dict[str, int] = {}
    added = 0

    def add(prompt: list[int]) -> None:
        nonlocal added
        name, added = str(added), added + 1
        length = choose.randint(1, 40)
        aborts[name] = choose.randint(1, length) if choose.random() < 0.2 else 1000
        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=LOGITS, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

    with Watch() as watch:
        coherence = Coherence(llm, watch)
        step = 0
        while step < steps or engine.has_unfinished_requests():
            if step < steps and choose.random() < 0.6:
                head = choose.choice(prefixes)[: choose.choice((0, 16, 33, 96, 150))]
                for _ in range(choose.choice((1, 1, 2, 3))):  # in one step: none has computed the prefix by then
                    tail = choose.choices(VOCABULARY, k=choose.randint(1, 50))
                    add(head + (tail[:6] * 8 if repeats else tail))
            step += 1
            for output in engine.step():
                answer = output.outputs[0]
                answers[output.request_id] = answer
                cached[output.request_id] = output.num_cached_tokens or 0
                if not output.finished and len(answer.token_ids) >= aborts[output.request_id]:
                    engine.abort_request([output.request_id], internal=False)
            if step % _CHECKED_EVERY == 0 or not engine.has_unfinished_requests():
                coherence.check()
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    names = sorted(answers, key=int)
    return {
        "tokens": [list(answers[name].token_ids) for name in names],
        "logits": [
            [{token: entry.logprob for token, entry in of.items()} for of in answers[name].logprobs] for name in names
        ],
        "steps": step,
        "cached": sum(cached.values()),
        "aborted": sum(count < 1000 for count in aborts.values()),
        "preemptions": metrics["vllm:num_preemptions"],
        "drafted": metrics.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens", 0),
        "checked": coherence.checked,
        "exact": coherence.exact,
        "worst": coherence.worst,
        **_counts(llm),
    }


def take_turns(llm: Any, groups: list[list[list[int]]], turns: int, max_tokens: int) -> dict[str, Any]:
    """Continue the prompts of one group, then those of the next, and so on.

    Args:
        llm: the engine, in this process.
        groups: prompts, which from the second time on are in the prefix cache.
        turns: of all groups together.
        max_tokens: that are decoded in a turn, the same every time.

    Returns:
        The continuations of the last turns, and the counts of the pool by turn.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    tokens, counts = [], []
    for turn in range(turns):
        prompts = [{"prompt_token_ids": ids} for ids in groups[turn % len(groups)]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
        counts.append(_counts(llm))
    return {"tokens": tokens[-len(groups) :], "counts": counts}
