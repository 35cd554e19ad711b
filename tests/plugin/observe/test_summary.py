"""The summary at start-up: a fact a line, and the metrics that say the same."""

import logging
from types import SimpleNamespace

import pytest
import torch

from tests.plugin.hot.test_budget import BLOCK, HEADS, LAYERS, PER_TOKEN, SIZE, Config, Layer
from xquant_vllm.plugin.hot import budget as hot_budget
from xquant_vllm.plugin.load.report import LoadedCache, load_notes
from xquant_vllm.plugin.observe import metrics
from xquant_vllm.plugin.observe import summary as summary_module
from xquant_vllm.plugin.observe.summary import Memory, publish, say
from xquant_vllm.scheme.formats import LayerFormat

BLOCKS = 100


class Compilation:
    """vLLM's; can be weakly referenced."""

    def __init__(self, layers) -> None:
        self.static_forward_context = layers


class Engine(Config):
    """A configuration, and what was made of its model."""

    def __init__(self, raw, *, quantized=(), tensor_parallel=1, **options) -> None:
        super().__init__(raw, **options)
        self.compilation_config = Compilation(self.compilation_config.static_forward_context)
        self.additional_config = {"xquant": raw}
        self.lora_config = None
        self.instance_id = "of no engine"
        self.model_config.max_model_len = self.needs.max_model_len
        self.model_config.model = "none"
        self.model_config.get_total_num_kv_heads = lambda: HEADS * tensor_parallel
        self.parallel_config = SimpleNamespace(world_size=tensor_parallel, tensor_parallel_size=tensor_parallel)
        self.device_config = SimpleNamespace(device_type="cpu")
        impls = [layer.impl for layer in self.compilation_config.static_forward_context.values()]
        self.formats: tuple[LayerFormat, ...] = tuple(impl.scheme.format for impl in impls)
        coverage = f"layers 0-{LAYERS - 1} are compressed, which is all"
        cache = LoadedCache(impls[0].settings, self.formats, "factors computed in 0.1 s", 4, tuple(quantized), coverage)
        self.notes = load_notes(self.compilation_config)
        self.notes.caches.append(cache)
        self.bytes = sum(form.bytes_per_token for form in self.formats)

    def memory(self) -> Memory:
        """Of 100 blocks, for one group with one block for 32 tokens."""
        sequence = self.needs.max_model_len // BLOCK
        spec = SimpleNamespace(max_memory_usage_pages=lambda config: sequence)
        group = SimpleNamespace(kv_cache_spec=spec, host_resident=False)
        hot = hot_budget.hot_memory(self)
        hot.share(BLOCKS * BLOCK * self.bytes + hot.taken)
        return Memory(self, SimpleNamespace(kv_cache_groups=[group], num_blocks=BLOCKS))


@pytest.fixture(autouse=True)
def _layers(monkeypatch):
    monkeypatch.setattr(hot_budget, "Attention", Layer)


@pytest.fixture
def lines(monkeypatch, caplog):
    """What the log says of an engine."""
    monkeypatch.setattr(summary_module, "board_of", lambda config: None)

    def lines(engine):
        caplog.clear()
        with caplog.at_level(logging.INFO, "vllm.xquant_vllm"):
            say(engine, engine.notes, engine.memory())
        return [record.message.removeprefix("xquant: ") for record in caplog.records]

    return lines


def test_ten_lines_of_a_plain_engine(lines):
    engine = Engine({"cache": "latent"})
    one, plain = engine.formats[0].bytes_per_token, 4 * HEADS * SIZE * LAYERS
    times = plain / engine.bytes
    gib = f"{BLOCKS * BLOCK * engine.bytes / 2**30:.2f}"
    *told, kernels = lines(engine)
    assert told == [
        'cache "latent" at key 4 / value 4 bits, method "xquant", groups of 64',
        "factors computed in 0.1 s",
        f"4 layers hold latents of keys and values at key 4 / value 4 bits, {one} bytes per token each, "
        f"{engine.bytes} together",
        f"4 layers take {engine.bytes} bytes per token, 16-bit keys and values take {plain} ({times:.2f}x)",
        f"pages hold 3,200 tokens, {times:.2f}x of what 16 bit would hold in all of it ({gib} of {gib} GiB)",
        "hot blocks: none, all sequences are attended from their pages",
        "layers 0-3 are compressed, which is all",
        "in 4 of 4 layers the up-projection of values is folded into the output projection",
        "metrics (xquant_...) are not on /metrics (without statistics of vLLM, or the server is elsewhere); "
        "quality probe: off",
    ]
    assert kernels.startswith("attention runs on ")


def test_a_pool_is_counted(lines):
    engine = Engine({"method": "xquant-cl", "cache": "x", "bits": 2})
    pages = BLOCKS * BLOCK * engine.bytes
    hot = hot_budget.hot_memory(engine)
    hot.take(pages // 4, PER_TOKEN)
    times = PER_TOKEN / engine.bytes * pages / (pages + hot.taken)
    text = "\n".join(lines(engine))
    assert f"pages hold 3,200 tokens, {times:.2f}x of what 16 bit would hold in all of it" in text
    assert f"GiB of the cache keep the keys and values of up to {hot.tokens:,} tokens in use" in text
    assert "3 layers hold the layer input at 4 bits" in text
    assert "1 layers hold differences of the layer input at 2 bits" in text


def test_a_layer_of_another_backend_and_a_hybrid(lines):
    engine = Engine({"cache": "latent"})
    kept = Layer(SimpleNamespace(num_kv_heads=HEADS, head_size=SIZE))
    kept.attn_backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
    engine.compilation_config.static_forward_context["kept"] = kept
    one = 4 * HEADS * SIZE
    assert engine.memory().times == pytest.approx(5 * one / (engine.bytes + one))
    engine.model_config.is_hybrid = True
    assert "pages hold 3,200 tokens (" in "\n".join(lines(engine))


def test_what_else_there_is_to_say(lines):
    engine = Engine({"cache": "latent"}, quantized=["qkv_proj"] * 4, tensor_parallel=2)
    engine.notes.remarks.append("of the draft, layers 4-5 keep keys and values (CPU_ATTN)")
    text = "\n".join(lines(engine))
    assert f"{engine.bytes} bytes per token on this rank" in text
    assert "4 quantized qkv_proj layers now hold their effective weight" in text
    assert "so latents are cached" in text
    assert "of the draft, layers 4-5 keep keys and values" in text


def test_many_kinds_are_summed_up(lines):
    engine = Engine({"cache": "latent"})
    shape = engine.formats[0].shape
    kinds = tuple(
        LayerFormat(
            shape, "latents", tuple(type(s)(s.num_heads, s.width, bits, 64, 0) for s in engine.formats[0].streams)
        )
        for bits in (8, 8, 8, 4, 4, 3, 3, 2, 2, 16)
    )
    old = engine.notes.caches[0]
    engine.notes.caches[0] = LoadedCache(old.settings, kinds, old.factors, 0, (), old.coverage)
    told = lines(engine)
    assert sum("layers hold latents" in line for line in told) == 4
    assert f"1 more layers, of 1 more kinds, take {kinds[-1].bytes_per_token} bytes per token together" in told


def test_the_metrics_say_the_same(monkeypatch):
    written = {}
    board = SimpleNamespace(set=lambda metric, value: written.__setitem__(metric, value))
    monkeypatch.setattr(summary_module, "board_of", lambda config: board)
    engine = Engine({"cache": "x", "hot": "25%"})
    hot = hot_budget.hot_memory(engine)
    hot.take(1 << 20, PER_TOKEN)
    memory = engine.memory()
    publish(engine, engine.notes, memory)
    assert written[metrics.BYTES] == engine.bytes
    assert written[metrics.PLAIN_BYTES] == PER_TOKEN
    assert written[metrics.CAPACITY] == 3200
    assert written[metrics.PLAIN_CAPACITY] == pytest.approx((memory.pages + memory.pool) / PER_TOKEN)
    assert written[metrics.HOT_CAPACITY] == hot.tokens > 0
    # They are there before the first step.
    assert {metric for metric in metrics.METRICS if not metric.layered} == set(written)
    begun = {}
    board.begin = begun.__setitem__
    monkeypatch.setattr(summary_module, "probe_of", lambda config: "a probe")
    publish(engine, engine.notes, memory)
    assert begun == {metric: [0, 1, 2, 3] for metric in metrics.METRICS if metric.layered}


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_of_tensor_parallelism_speaks(monkeypatch, rank):
    from vllm.v1.worker.cpu_worker import CPUWorker

    said, published = [], []
    monkeypatch.setattr(CPUWorker, "initialize_from_config", lambda self, config: "made")
    monkeypatch.setattr(summary_module, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(summary_module, "Memory", lambda *arguments: None)
    monkeypatch.setattr(summary_module, "say", lambda *arguments: said.append(arguments))
    monkeypatch.setattr(summary_module, "publish", lambda *arguments: published.append(arguments))
    summary_module.summarize_start.cache_clear()
    summary_module.summarize_start()
    engine = Engine({"cache": "latent"})
    assert CPUWorker.initialize_from_config(SimpleNamespace(vllm_config=engine), None) == "made"
    assert (len(said), len(published)) == (1 - rank, 1)
    # Engines of other backends have nothing to say.
    engine.notes.caches.clear()
    CPUWorker.initialize_from_config(SimpleNamespace(vllm_config=engine), None)
    assert len(published) == 1
    summary_module.summarize_start.cache_clear()
    assert torch.bfloat16 == engine.model_config.dtype
