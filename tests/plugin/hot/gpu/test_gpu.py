"""A layer served through a pool as on a GPU, its kernels interpreted, against the reference, step by step."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from benchmarks.gpu.cases import make_plan
from tests.attention.attention_cases import Spec
from xquant_vllm.attention import dispatch, reference
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.gpu import kernels
from xquant_vllm.attention.hot import reference as token_reference
from xquant_vllm.attention.hot.rematerialize import rematerialize
from xquant_vllm.attention.hot.tokens import HotTokens
from xquant_vllm.plugin.connectors.transfers import Page, PageTransfers
from xquant_vllm.plugin.hot import gpu as hot_gpu
from xquant_vllm.plugin.hot import gpu_memory as hot_gpu_memory
from xquant_vllm.plugin.hot import gpu_steps
from xquant_vllm.plugin.hot.budget import hot_memory

BLOCK, BLOCKS, MAX_LEN, ROWS, STEP = 16, 24, 64, 3, 32
HEADS, GROUP, SIZE = 1, 2, 16
CPU = torch.device("cpu")


class Layer:
    """What is asked of vLLM's ``Attention`` and of its implementation."""

    def __init__(self, spec: Spec) -> None:
        self.planned = make_plan(spec)
        page_bytes = self.planned.layout.page_bytes
        # Whatever nobody has written is poison: infinite scales, the largest codes.
        self.kv_cache = torch.full((BLOCKS, page_bytes), 0xFF, dtype=torch.uint8)
        self.impl = self
        self.scheme = self
        self.head_size, self.num_kv_heads = SIZE, HEADS

    def plan(self, block_size: int):
        assert block_size == BLOCK
        return self.planned

    def set_pool(self, pool) -> None:
        self.pool = pool

    def write_hot(self, kv_cache, tokens) -> None:
        self.pool.write([kv_cache], self.planned, tokens, None, None)


class Config:
    """Of vLLM; can be weakly referenced."""

    def __init__(self, layer: Layer) -> None:
        self.compilation_config = SimpleNamespace(
            static_forward_context={"layer": layer}, max_cudagraph_capture_size=None
        )
        self.model_config = SimpleNamespace(dtype=torch.float32, max_model_len=MAX_LEN)
        self.cache_config = SimpleNamespace(block_size=BLOCK, num_gpu_blocks=BLOCKS)
        self.scheduler_config = SimpleNamespace(max_num_seqs=ROWS, max_num_batched_tokens=STEP)
        self.speculative_config = None


class Request:
    def __init__(self, name: str, blocks: list[int], computed: int, tokens: int) -> None:
        self.name, self.blocks, self.computed, self.tokens = name, blocks, computed, tokens


class Engine:
    """A scheduler of a few requests, one layer, and the pool."""

    def __init__(self, spec: Spec, pool_tokens: int, seed: int) -> None:
        self.choose, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.layer = Layer(spec)
        self.config, self.window = Config(self.layer), spec.window
        hot_memory(self.config).take(pool_tokens, 1)
        kind = FullAttentionSpec
        arguments = {"block_size": BLOCK, "num_kv_heads": HEADS, "head_size": SIZE, "dtype": torch.float32}
        if spec.window:
            kind, arguments = SlidingWindowSpec, arguments | {"sliding_window": spec.window}
        self.builder = hot_gpu.HotGpuBuilder(kind(**arguments), ["layer"], [self.layer], self.config, CPU)
        self.group = hot_gpu.hot_engine(self.config).groups[("layer",)]
        self.steps = gpu_steps.HotSteps()
        self.free = list(range(1, BLOCKS))
        self.running: list[Request] = []
        self.finished: set[str] = set()
        self.known: dict[str, int] = {}  # blocks that a request's outputs have named
        self.started = 0
        self.left_out = 0  # rows that prefill and of which pages are known not to be needed

    def new_request(self) -> None:
        """Sometimes with blocks of another request's prefix, as prefix hits have it."""
        blocks, computed = [], 0
        donors = [request for request in self.running if request.computed >= BLOCK]
        if donors and self.choose.random() < 0.5:
            donor = self.choose.choice(donors)
            shared = self.choose.randint(1, donor.computed // BLOCK)
            blocks, computed = donor.blocks[:shared], shared * BLOCK
        tokens = min(MAX_LEN, computed + self.choose.randint(1, 60))
        self.started += 1
        self.running.append(Request(f"request {self.started}", list(blocks), computed, tokens))

    def finish(self, request: Request) -> None:
        self.running.remove(request)
        self.finished.add(request.name)
        still = {block for other in self.running for block in other.blocks}
        self.free += [block for block in request.blocks if block not in still and block not in self.free]
        self.choose.shuffle(self.free)

    def schedule(self):
        """vLLM's ``SchedulerOutput`` of a step, and its rows."""
        rows, room = [], STEP
        for request in self.running:
            count = min(max(1, request.tokens - request.computed), room, self.choose.choice((5, 20, 32)))
            count = min(count, MAX_LEN - request.computed)
            need = -(-(request.computed + count) // BLOCK) - len(request.blocks)
            if count <= 0 or need > len(self.free) or self.choose.random() < 0.15:
                continue
            request.blocks += [self.free.pop() for _ in range(need)]
            room -= count
            rows.append((request, count))
        new = [
            SimpleNamespace(req_id=of.name, block_ids=([*of.blocks],), num_computed_tokens=of.computed)
            for of, _ in rows
            if of.name not in self.known
        ]
        old = [of for of, _ in rows if of.name in self.known]
        resumed = {of.name for of in old if self.choose.random() < 0.2}
        more = [([*of.blocks] if of.name in resumed else of.blocks[self.known[of.name] :],) for of in old]
        self.known |= {of.name: len(of.blocks) for of, _ in rows}
        output = SimpleNamespace(
            finished_req_ids=self.finished,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[of.name for of in old],
                resumed_req_ids=resumed,
                new_block_ids=[blocks if blocks[0] else None for blocks in more],
                num_computed_tokens=[of.computed for of in old],
            ),
            num_scheduled_tokens={of.name: count for of, count in rows},
            kv_cache_block_copies=None,
            kv_connector_metadata=None,
        )
        self.finished = set()
        return output, rows

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention with the pool and without."""
        if len(self.running) < ROWS and self.choose.random() < 0.5:
            self.new_request()
        for request in list(self.running):
            if request.computed >= MAX_LEN or self.choose.random() < 0.06:
                self.finish(request)
        output, rows = self.schedule()
        groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["layer"])])
        self.steps.decide(self.config, groups, output)
        self.choose.shuffle(rows)  # the runner has an order of its own
        rows.sort(key=lambda row: row[1] > 1)
        result = self.forward(rows)
        self.group.decide(None)
        for request, count in rows:
            request.computed += count
        return result

    def forward(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        plan, total = self.layer.planned, sum(count for _, count in rows)
        if not total:
            return torch.zeros(0), torch.zeros(0)
        table = torch.full((len(rows), MAX_LEN // BLOCK), 0, dtype=torch.int32)
        slots = []
        for index, (request, count) in enumerate(rows):
            table[index, : len(request.blocks)] = torch.tensor(request.blocks)
            slots += [
                request.blocks[position // BLOCK] * BLOCK + position % BLOCK
                for position in range(request.computed, request.computed + count)
            ]
        counts = [count for _, count in rows]
        lengths = [request.computed + count for request, count in rows]
        batch = AttentionBatch(
            torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            table,
            max(counts),
            tuple(zip(counts, lengths, strict=True)),
        )
        mapping = torch.tensor(slots, dtype=torch.int64)
        inputs = [torch.randn(total, of.num_heads, of.width, generator=self.generator) for of in plan.layout.streams]
        query = torch.randn(total, HEADS * GROUP, SIZE, generator=self.generator)
        pages = [self.layer.kv_cache]
        reference.store(pages, plan, mapping, inputs)
        common = SimpleNamespace(slot_mapping=mapping, num_actual_tokens=total, max_seq_len=MAX_LEN)
        hot = self.builder.build(common, batch)
        expected, actual = torch.full_like(query, 77.0), torch.full_like(query, 77.0)
        reference.paged_attention(query, pages, plan, batch, expected)
        self.layer.write_hot(self.layer.kv_cache, hot.written)
        if hot.hot is None:
            return expected, expected
        if hot.cold is not None:
            self.left_out += sum(count > 1 and not length for count, length in hot.cold.lengths)
        self.layer.pool.attend(query, pages, plan, hot, actual)
        return actual, expected


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(hot_gpu_memory, "Attention", Layer)
    monkeypatch.setattr(dispatch, "select", lambda device_type: kernels)


def spec_of(**changes) -> Spec:
    settings = {"kv_heads": HEADS, "group": GROUP, "head_size": SIZE, "hidden_size": 32, "block_size": BLOCK}
    settings |= {"key_bits": 16, "value_bits": 16, "key_outliers": 0, "key_group": 16, "value_group": 16, "bias": True}
    return Spec(**(settings | changes))


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("spec", "pool"),
    [
        pytest.param(spec_of(kind="x"), 400, id="X"),
        pytest.param(spec_of(sinks=True, norm=True), 400, id="sinks", marks=pytest.mark.nightly),
        pytest.param(spec_of(folded=True), 96, id="folded, small pool"),
        pytest.param(spec_of(kind="x", window=20, soft_cap=5.0), 200, id="window, soft cap", marks=pytest.mark.nightly),
    ],
)
def test_every_step_is_as_without_a_pool(spec: Spec, pool: int) -> None:
    """Prompts in chunks, prefix hits, freed and reused blocks, requests that are left out of steps."""
    engine = Engine(spec, pool, seed=3)
    small = pool < 100
    engine.group.hot_map._idle_steps = 2 if small else 64  # a row that was left out soon loses its blocks
    for _ in range(24):
        assert_near(*engine.step())
    counts = engine.group.hot_map.counts
    print(counts)
    assert counts.hot_rows > 10
    if small:
        assert counts.cold_rows > 5
        assert engine.left_out > 0
        assert counts.promoted_tokens > 0


def test_copied_blocks_empty_the_map() -> None:
    """vLLM writes pages without the store."""
    engine = Engine(spec_of(kind="x"), 400, seed=1)
    for _ in range(6):
        engine.step()
    assert engine.group.hot_of.any()
    output, _ = engine.schedule()
    output.kv_cache_block_copies = [(1, 2)]
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["layer"])])
    engine.steps.decide(engine.config, groups, output)
    assert not engine.group.hot_of.any()
    assert engine.group.decided == "none"


def test_blocks_that_a_connector_reads_are_forgotten() -> None:
    engine = Engine(spec_of(kind="x"), 400, seed=1)
    for _ in range(6):
        engine.step()
    output, _ = engine.schedule()
    hot = np.flatnonzero(engine.group.hot_map.hot_of(np.arange(200)))
    assert len(hot) > 1
    output.num_scheduled_tokens = {}
    output.kv_connector_metadata = PageTransfers({"request": [Page(0, b"key", int(hot[0]))]})
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["layer"])])
    engine.steps.decide(engine.config, groups, output)
    assert np.flatnonzero(engine.group.hot_map.hot_of(np.arange(200))).tolist() == hot[1:].tolist()


def test_a_graph_is_captured_with_both_calls() -> None:
    """Nothing is decided where the step is not the scheduler's; tensors are the same for every batch."""
    engine = Engine(spec_of(kind="x"), 400, seed=1)

    def build(rows: int):
        batch = AttentionBatch(
            torch.arange(rows + 1, dtype=torch.int32),
            torch.full((rows,), 30, dtype=torch.int32),
            torch.zeros(rows, MAX_LEN // BLOCK, dtype=torch.int32),
            1,
        )
        slots = torch.full((rows,), -1, dtype=torch.int64)
        return engine.builder.build(SimpleNamespace(slot_mapping=slots, num_actual_tokens=rows, max_seq_len=30), batch)

    engine.group.decide("all")
    assert build(2).cold is None
    engine.group.decide(None)
    first, second = build(3), build(2)
    for of in (first, second):
        assert of.hot is not None
        assert of.cold is not None
    for x, y in (
        (first.hot.batch.seq_lens, second.hot.batch.seq_lens),
        (first.hot.batch.block_table, second.hot.batch.block_table),
        (first.cold.seq_lens, second.cold.seq_lens),
        (first.written.hot_slots, second.written.hot_slots),
        (first.hot.tokens, second.hot.tokens),
    ):
        assert x.data_ptr() == y.data_ptr()


def test_memory_is_what_is_counted() -> None:
    """Beside the pool: buffers, one more output, up-projections."""
    for spec in (spec_of(kind="x"), spec_of(kind="deltas", earlier=(4,)), spec_of()):
        plan = make_plan(spec)
        memory = hot_gpu_memory.HotGpuMemory([plan], 7, torch.float16)
        ups = [up for up in (plan.projection.up_key, plan.projection.up_value) if up is not None]
        counted = hot_gpu_memory.HotGpuMemory.bytes_of([plan], 7, torch.float16)
        held = {x.data_ptr(): x.nbytes for owner in (memory, memory.buffers) for x in tensors_of(owner)}
        assert counted == sum(held.values()) + 2 * sum(up.numel() for up in ups)


def tensors_of(owner) -> list[torch.Tensor]:
    return [x for x in vars(owner).values() if isinstance(x, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Notes what a CUDA graph cannot hold, and what takes memory; and what reads from the device."""

    FORBIDDEN = (
        "local_scalar_dense",
        "pin_memory",
        "nonzero",
        "lift_fresh",
        "empty",
        "zeros",
        "full.",
        "to_copy",
        "clone",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_allocates_nothing_and_reads_nothing_back(monkeypatch) -> None:
    """Launches aside: the interpreter's own copies are no part of them."""
    engine = Engine(spec_of(kind="x"), 400, seed=1)
    engine.step()
    batch = AttentionBatch(
        torch.arange(3, dtype=torch.int32), torch.tensor([30, 20], dtype=torch.int32), torch.ones(2, 4).int(), 1
    )
    common = SimpleNamespace(slot_mapping=torch.tensor([17, 18]), num_actual_tokens=2, max_seq_len=30)
    launched = []
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *a, **k: launched.append(grid))
    with Watch() as watch:
        hot = engine.builder.build(common, batch)
        engine.layer.write_hot(engine.layer.kv_cache, hot.written)
    assert len(launched) == 3
    assert not [name for name in watch.seen if any(word in name for word in Watch.FORBIDDEN)]


def test_the_blocks_of_requests() -> None:
    requests = gpu_steps.RequestBlocks()
    nothing = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
    a = SimpleNamespace(req_id="a", block_ids=([1, 2], [7]), num_computed_tokens=0)
    b = SimpleNamespace(req_id="b", block_ids=([3], [8]), num_computed_tokens=16)
    first = SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[a, b], scheduled_cached_reqs=nothing)
    assert requests.follow(first) == {"a": 0, "b": 16}
    cached = SimpleNamespace(
        req_ids=["b", "a"],
        resumed_req_ids={"a"},
        new_block_ids=[None, ([5, 6, 4], [9])],
        num_computed_tokens=[17, 32],
    )
    second = SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[], scheduled_cached_reqs=cached)
    assert requests.follow(second) == {"b": 17, "a": 32}
    assert requests.table(["b", "a"], 0).tolist() == [[3, 0, 0], [5, 6, 4]]
    assert requests.table(["b", "a"], 1).tolist() == [[8], [9]]
    grown = SimpleNamespace(
        req_ids=["b"], resumed_req_ids=set(), new_block_ids=[([10], [11])], num_computed_tokens=[32]
    )
    third = SimpleNamespace(finished_req_ids={"a"}, scheduled_new_reqs=[], scheduled_cached_reqs=grown)
    assert requests.follow(third) == {"b": 32}
    assert requests.table(["b"], 0).tolist() == [[3, 10]]
    with pytest.raises(KeyError):
        requests.table(["a"], 0)


def test_a_chain_is_promoted_layer_by_layer() -> None:
    """A layer adds its own pages to what the layer before has left; garbage is all that it would find elsewhere."""
    first, second = Layer(spec_of(kind="x")), Layer(spec_of(kind="deltas", earlier=(16,)))
    slots = torch.arange(16, 40)
    for layer in (first, second):
        plan = layer.planned
        inputs = [torch.randn(24, of.num_heads, of.width) for of in plan.layout.streams]
        pages = [layer.kv_cache, first.kv_cache][: len(plan.layouts)]
        reference.store(pages, plan, slots, inputs)
    plans = [first.planned, second.planned]
    memory = hot_gpu_memory.HotGpuMemory(plans, 24, torch.float32)
    for layer in (first, second):
        layer.set_pool(hot_gpu.HotGpuPool(4, layer.planned, memory))
    hot_slots = np.arange(24) + 16
    wanted = rematerialize(
        token_reference,
        [second.kv_cache, first.kv_cache],
        second.planned,
        HotTokens(slots, torch.arange(24), slots),
        torch.float32,
    )
    garbage = torch.full_like(first.kv_cache, 0xFF)
    first.write_hot = lambda cache, tokens: first.pool.write([cache], plans[0], tokens, "first", None)
    second.write_hot = lambda cache, tokens: second.pool.write([cache, garbage], plans[1], tokens, "second", "first")
    group = SimpleNamespace(hot_of=torch.zeros(1), layer_names=("first", "second"))
    step = SimpleNamespace(promoted=24, slots=slots.numpy(), positions=np.arange(24), hot_slots=hot_slots)
    gpu_steps._promote(group, step, {"first": first, "second": second})
    for pool, expected in zip((second.pool.keys, second.pool.values), wanted, strict=True):
        torch.testing.assert_close(pool.flatten(0, 1)[16:40], expected, rtol=1e-4, atol=1e-4)
