"""The C++ kernels against the reference."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.attention import attention_cases
from tests.attention.attention_cases import Case, Spec, make_plan, random_spec
from tests.attention.byte_case import in_bytes, on_bytes, run_reference
from tests.attention.cpu.twin import twin
from tests.attention.integer_case import on_integers
from tests.attention.stored_pages import assert_same_pages, make_store_case
from tests.cpu_kernels import assert_close, bits, has_kernels
from xquant_vllm.attention import reference
from xquant_vllm.attention.batch import AttentionBatch
from xquant_vllm.attention.latents import LatentTerm, Prediction
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import PageLayout, StreamFormat
from xquant_vllm.codec.pages import load_slots
from xquant_vllm.codec.rotation import hadamard_rotation
from xquant_vllm.projection.rematerialize import LayerProjection

if not has_kernels():
    pytest.skip("no kernels", allow_module_level=True)

from xquant_vllm.attention.cpu import kernels as cpu
from xquant_vllm.attention.cpu import library
from xquant_vllm.attention.cpu import plan as cpu_plan


def make_case(spec: Spec) -> Case:
    """Of a key up-projection that is exact in integers; test_keys_in_16_bits takes others."""
    case = attention_cases.make_case(spec)
    return on_bytes(case) if in_bytes(case) else on_integers(case)


# --- Attention ---


@pytest.mark.parametrize("seed", range(60))
def test_attention(isa: str, seed: int) -> None:
    spec = random_spec(seed)
    print(spec)
    case = make_case(spec)
    assert_close(case.run(cpu), run_reference(case))


@pytest.mark.parametrize("seed", range(100, 130))
def test_exact_prompts(isa: str, seed: int) -> None:
    """Tokens that are attended to exactly are not in the pages."""
    case = make_case(replace(random_spec(seed), exact_from=2))
    assert_close(case.run(cpu), run_reference(case))


@pytest.mark.parametrize("spec", [spec for spec in map(random_spec, range(30)) if spec.kind == "latent"])
def test_keys_by_integers_are_exact(isa: str, spec: Spec) -> None:
    """With values in FP16, which are not weighed by integers."""
    case = make_case(replace(spec, value_bits=16, allocated=0.0, rope="neox"))
    in_bfloats = isa.startswith("amx") and spec.dtype == torch.bfloat16
    assert_close(case.run(cpu), run_reference(case), None if in_bfloats else 1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_keys_in_16bits(isa: str, seed: int) -> None:
    """Any up-projection: rounded to 16 bits."""
    case = attention_cases.make_case(random_spec(seed))
    assert_close(case.run(cpu), run_reference(case), 2e-3)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("kind", ["x", "deltas"])
def test_keys_in_bytes(isa: str, kind: str, bits: int) -> None:
    """Any up-projection of X or of a sum of X, rounded to 8 bits as the latents are, against nothing rounded."""
    spec = Spec(seqs=((300, 3), (64, 40)), kv_heads=4, kind=kind, earlier=(4, 2), key_bits=bits, key_outliers=0)
    case = attention_cases.make_case(spec)
    assert in_bytes(case) == library.multiplies_integers()
    assert_close(case.run(cpu), case.run(reference), 0.1)


@pytest.mark.parametrize("kind", ["x", "deltas"])
def test_exact_prompts_beside_bytes(isa: str, kind: str) -> None:
    spec = Spec(seqs=((300, 40), (30, 30), (70, 1), (600, 17)), kind=kind, earlier=(4, 2), key_outliers=0, exact_from=2)
    case = make_case(spec)
    assert_close(case.run(cpu), run_reference(case))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_shared_latents(isa: str, value: float) -> None:
    """It reaches the queries that see it in all heads, and no others; the tokens beside it stay as they are."""
    case = make_case(Spec(seqs=((257, 3), (20, 1)), kind="x", key_outliers=0, kv_heads=3))
    before = case.run(cpu)
    scale = case.plan.layout.offsets[0].scales
    page = case.pages[0][case.batch.block_table[0, 256 // 16]]
    page[scale : scale + 2] = torch.tensor([value]).half().view(torch.uint8)
    output = case.run(cpu)
    assert output[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(output[others], before[others])


LARGE = {
    "long decode": Spec(seqs=((2000, 1), (1, 1), (257, 1), (1025, 1)), kv_heads=3),
    "long prefill": Spec(seqs=((700, 500),), head_size=64),
    "wide head": Spec(seqs=((300, 2),), head_size=256, key_group=128, value_group=256, bias=True, norm=True),
    "joint, many groups": Spec(
        seqs=((300, 3), (64, 64)), kv_heads=5, head_size=72, joint=True, key_group=24, value_group=72, key_bits=3,
        value_bits=3, norm=True, value_outliers=2,
    ),
    "joint, one group": Spec(
        seqs=((90, 2),), kv_heads=8, head_size=128, joint=True, key_group=1024, value_group=512, key_bits=2,
        value_bits=8, block_size=64,
    ),
    "many queries per kv head": Spec(seqs=((40, 3),), kv_heads=1, group=211, head_size=8, key_group=8, value_group=8),
    "X": Spec(seqs=((300, 3), (64, 64)), kv_heads=9, group=1, kind="x", hidden_size=576, key_group=96),
    "chain of deltas of X": Spec(
        seqs=((300, 2), (64, 64)), kv_heads=3, group=1, kind="deltas", earlier=(4, 2, 3, 2, 2, 8, 2), hidden_size=576,
        key_group=96, key_bits=2,
    ),
    "X in bytes": Spec(seqs=((300, 3), (64, 64), (520, 1)), kv_heads=9, group=1, kind="x", hidden_size=576,
                       key_group=96, key_outliers=0, bias=True, sinks=True),
    "sum of X in bytes": Spec(
        seqs=((300, 2), (64, 40), (65, 1)), kv_heads=3, group=2, kind="deltas", earlier=(4, 2, 2, 3, 3, 2),
        hidden_size=328, key_group=8, key_bits=2, key_outliers=0, window=100, soft_cap=20.0, norm=True,
        rope="interleaved",
    ),
    "long sum": Spec(
        seqs=((100, 2), (40, 40)), kv_heads=2, group=1, kind="deltas", earlier=(4, *(2,) * 40), hidden_size=96,
        key_group=96, key_bits=2, key_outliers=0,
    ),
    "chain of latents": Spec(
        seqs=((300, 2), (64, 64)), kv_heads=3, joint=True, kind="chain", earlier=(4, 16, 2), key_group=96, key_bits=2,
    ),
    "absorbed keys": Spec(seqs=((300, 2), (64, 64)), kv_heads=9, group=1, kind="x", hidden_size=576, key_group=192,
                          rope="none", bias=True),
    "runs": Spec(seqs=((700, 1), (65, 64)), kv_heads=3, allocated=1.0, seed=1),
    "runs, wide head": Spec(seqs=((300, 20),), head_size=256, allocated=1.0, norm=True, seed=2),
    "runs, joint": Spec(seqs=((300, 3), (64, 64)), kv_heads=8, head_size=128, joint=True, allocated=1.0, seed=3),
    "runs, X": Spec(seqs=((100, 3),), kv_heads=9, group=1, kind="x", hidden_size=576, allocated=1.0, seed=4),
    "chain of runs": Spec(
        seqs=((300, 2), (64, 64)), kv_heads=3, kind="chain", earlier=(4, 16, 2, 2), allocated=0.8, seed=5,
    ),
    "chain of joint runs": Spec(
        seqs=((100, 2), (64, 64)), kv_heads=4, head_size=80, joint=True, kind="chain", earlier=(4, 2), allocated=1.0,
        key_group=40, rope="none", seed=6,
    ),
    "folded": Spec(seqs=((700, 1), (65, 64)), kv_heads=3, head_size=72, key_group=72, value_group=24, bias=True,
                   sinks=True, value_outliers=1, folded=True),
    "folded runs": Spec(seqs=((700, 1), (65, 64)), kv_heads=3, allocated=1.0, folded=True, seed=1),
    "folded, few channels stored": Spec(seqs=((300, 2),), head_size=128, allocated=1.0, bias=True, folded=True, seed=7),
    "long window": Spec(seqs=((1500, 1), (1000, 300)), window=600, soft_cap=20.0, block_size=128),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_large(isa: str, name: str) -> None:
    case = make_case(LARGE[name])
    assert_close(case.run(cpu), run_reference(case))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_extreme_scores(isa: str, scale: float) -> None:
    """All scores equal, and so far apart that most weights underflow."""
    case = make_case(Spec(seqs=((600, 4),)))
    case = replace(case, plan=replace(case.plan, scale=scale))
    # A score of 1000 has an FP32 step of 6e-5, so weights differ by that much whatever the kernel.
    expected, actual = case.run(twin()), case.run(cpu)
    torch.testing.assert_close(actual, expected, atol=1e-5 * (1 + 10 * scale), rtol=0)


@pytest.mark.parametrize("last_position", [0, 63, 256, 300])
def test_nan_query(isa: str, last_position: int) -> None:
    case = make_case(Spec(seqs=((last_position + 1, 1), (20, 1))))
    case.query[0] = torch.nan
    output = case.run(cpu)
    assert output[0].isnan().all()
    assert output[1].isfinite().all()


def test_nan_key(isa: str) -> None:
    """A NaN in the only key of a stretch reaches its queries, and no earlier one."""
    case = make_case(Spec(seqs=((257, 3),)))
    latents = torch.full((1, 2 * 64), torch.nan), torch.zeros(1, 2 * 64)
    slot = case.batch.block_table[0, 256 // 16].long() * 16
    reference.store(case.pages, case.plan, slot[None], latents)
    output, expected = case.run(cpu), case.run(twin())
    assert expected[2].isnan().all()
    assert output[2].isnan().all()
    assert_close(output[:2], expected[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_output_once(isa: str, dtype: torch.dtype) -> None:
    # Of keys that are turned AMX has other scores for FP32 queries.
    rope = "none" if isa.startswith("amx") else "neox"
    spec = Spec(seqs=((100, 40), (300, 1)), dtype=dtype, head_size=72, key_group=24, value_group=24, rope=rope)
    case = make_case(spec)
    case.query[5] = torch.nan
    rounded = case.run(cpu)[:41]
    exact = replace(case, query=case.query.float()).run(cpu)[:41]
    torch.testing.assert_close(rounded, exact.to(dtype), atol=0, rtol=0, equal_nan=True)


def test_rounds_to_even(isa: str) -> None:
    """Every finite FP16 number, passed through as an outlier of a value, comes out as torch rounds it to BF16."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = torch.cat((halves[halves.isfinite()], torch.zeros(2))).unflatten(0, (-1, 7)).float()
    stream = StreamFormat(1, 8, 8, 8, 7)
    projection = LayerProjection(torch.eye(8)[None], torch.eye(8)[None])
    plan = AttentionLayerPlan((PageLayout((stream, stream), 16),), projection, 1, 1.0, sliding_window=1)
    tokens = halves.shape[0]
    latents = torch.nn.functional.pad(halves, (0, 1))
    pages = torch.zeros(-(-tokens // 16), plan.layout.page_bytes, dtype=torch.uint8)
    reference.store((pages,), plan, torch.arange(tokens), (latents, latents))
    starts, lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    batch = AttentionBatch(starts, lengths, torch.arange(pages.shape[0], dtype=torch.int32)[None])
    for dtype in (torch.float16, torch.bfloat16):
        output = torch.empty(tokens, 1, 8, dtype=dtype)
        cpu.paged_attention(torch.zeros(tokens, 1, 8, dtype=dtype), (pages,), plan, batch, output)
        assert torch.equal(output[:, 0, :7], halves.to(dtype))


def test_reads_every_scale(isa: str) -> None:
    """Values whose pages hold any bytes at all come out as the reference reads them."""
    runs = ((8, 4), (6, 8), (4, 4), (3, 8), (2, 4))
    layout = PageLayout((StreamFormat(1, 8, 4, 8), AllocatedFormat(32, (runs,))), 16)
    projection = LayerProjection(torch.zeros(1, 8, 32), torch.eye(32)[None])
    plan = AttentionLayerPlan((layout,), projection, 1, 1.0, sliding_window=1)
    tokens = 512
    pages = torch.randint(256, (tokens // 16, layout.page_bytes), dtype=torch.uint8)
    start = layout.offsets[1].scales
    pages[:, start : start + 16] = torch.arange(tokens).to(torch.uint8).view(-1, 16)
    pages[:, layout.offsets[0].scales : start] = 0
    starts, lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    batch = AttentionBatch(starts, lengths, torch.arange(pages.shape[0], dtype=torch.int32)[None])
    output = torch.empty(tokens, 1, 32)
    cpu.paged_attention(torch.zeros(tokens, 1, 32), (pages,), plan, batch, output)
    expected = load_slots(pages, layout, torch.arange(tokens), 1)
    assert ((output - expected).abs() <= 1e-6 * expected.abs().amax(-1, keepdim=True)).all()
    assert (output[..., 28:] == 0).all()


def test_strided_output(isa: str) -> None:
    case = make_case(Spec(seqs=((70, 3), (20, 20)), head_size=72, key_group=72, value_group=72))
    tokens, heads, size = case.query.shape
    buffer = torch.full((tokens, 2, heads, size + 16), 5.0)
    case.run(cpu, buffer[:, 1, :, 8:-8])
    assert_close(buffer[:23, 1, :, 8:-8], case.run(twin())[:23])
    assert (buffer[:, 0] == 5).all()
    assert (buffer[..., :8] == 5).all()
    assert (buffer[..., -8:] == 5).all()
    assert (buffer[23:] == 5).all()


def test_empty_batches(isa: str) -> None:
    case = make_case(Spec(seqs=((16, 0), (5, 0))))
    assert (case.run(cpu) == 77).all()
    batch = case.batch
    nothing = replace(
        case, batch=replace(batch, query_start_loc=batch.query_start_loc[:1], seq_lens=batch.seq_lens[:0])
    )
    assert (nothing.run(cpu) == 77).all()


INVARIANT = {
    "head basis": Spec(seqs=((900, 1), (300, 1), (1100, 150), (17, 17), (513, 2)), kv_heads=2),
    "joint basis": Spec(
        seqs=((600, 1), (270, 90)), kv_heads=3, head_size=24, joint=True, key_group=8, value_group=24, norm=True
    ),
    "window": Spec(seqs=((900, 1), (600, 100)), window=300, soft_cap=10.0, dtype=torch.bfloat16),
    "deltas": Spec(seqs=((600, 1), (270, 90)), kind="deltas", earlier=(4, 2), hidden_size=72, key_group=24),
    "X in bytes": Spec(
        seqs=((600, 1), (570, 90), (40, 33)),
        kind="x",
        kv_heads=3,
        key_outliers=0,
        window=300,
        norm=True,
    ),
    # 150 query tokens have tasks of single kv heads, fewer share latents.
    "X, too many rows to share": Spec(
        seqs=((300, 1), (270, 150)),
        kind="x",
        kv_heads=9,
        group=1,
        hidden_size=576,
        key_group=96,
        key_outliers=0,
    ),
    "sum in bytes": Spec(seqs=((600, 1), (270, 90)), kind="deltas", earlier=(4, 2), key_bits=2, key_outliers=0),
    "absorbed chain": Spec(seqs=((600, 1), (270, 90)), kind="chain", earlier=(4, 2), joint=True, rope="none"),
    "runs": Spec(seqs=((600, 1), (270, 90)), allocated=1.0, window=300, seed=7),
}


@pytest.mark.parametrize("name", INVARIANT)
def test_same_bits_alone(isa: str, name: str) -> None:
    """A sequence's output does not depend on its neighbours, nor a token's on the other query tokens."""
    case = make_case(INVARIANT[name])
    together = case.run(cpu)
    starts = case.batch.query_start_loc.tolist()
    for sequence, (_, new) in enumerate(INVARIANT[name].seqs):
        expected = together[starts[sequence] : starts[sequence + 1]]
        for last in sorted({1, new // 2 + 1, new}):
            alone = case.only(sequence, last).run(cpu)
            assert torch.equal(bits(alone), bits(expected[-last:])), (sequence, last)


@pytest.mark.parametrize("name", INVARIANT)
def test_same_bits_chunked(isa: str, name: str) -> None:
    """A prompt prefilled in chunks, each of which sees a shorter sequence, gives what it gives at once."""
    case = make_case(INVARIANT[name])
    sequence = max(range(len(INVARIANT[name].seqs)), key=lambda i: INVARIANT[name].seqs[i][1])
    length, new = INVARIANT[name].seqs[sequence]
    alone = case.only(sequence)
    expected = alone.run(cpu)
    for begin, end in ((0, 1), (1, 30), (30, 31), (31, new)):
        shorter = torch.tensor([length - new + end], dtype=torch.int32)
        starts = torch.tensor([0, end - begin], dtype=torch.int32)
        batch = replace(alone.batch, seq_lens=shorter, query_start_loc=starts)
        part = replace(alone, batch=batch, query=alone.query[begin:end])
        assert torch.equal(bits(part.run(cpu)), bits(expected[begin:end])), (begin, end)


@pytest.mark.parametrize("name", INVARIANT)
def test_same_bits_on_any_threads(isa: str, name: str) -> None:
    case = make_case(INVARIANT[name])
    outputs = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert library.num_threads() == threads
        outputs += [case.run(cpu), case.only(0).run(cpu)]
    for index in range(2, len(outputs)):
        assert torch.equal(bits(outputs[index]), bits(outputs[index % 2]))


# --- Store ---


@pytest.mark.parametrize("seed", range(60))
def test_store(isa: str, seed: int) -> None:
    spec, tokens, kind = random_spec(seed), (1, 3, 8, 40)[seed % 4], ("normal", "special", "constant")[seed % 3]
    print(spec)
    make_store_case(spec, tokens, kind).check(cpu.store)


def test_store_many_tokens(isa: str) -> None:
    """Enough tokens for all threads."""
    plan = make_plan(Spec(kv_heads=3, joint=True, key_group=192, value_group=32, key_bits=3))
    torch.manual_seed(0)
    key, value = torch.randn(2, 500, 192, dtype=torch.bfloat16)
    slots = torch.randperm(512)[:500]
    pages, expected = torch.zeros(2, 32, plan.layout.page_bytes, dtype=torch.uint8)
    torch.set_num_threads(4)
    cpu.store((pages,), plan, slots, (key, value))
    reference.store((expected,), plan, slots, (key, value))
    assert_same_pages(pages, expected, plan, slots, (key, value))


def test_store_ties(isa: str) -> None:
    """Numbers halfway between two codes go to the even one; every FP16 number is a zero point of its own."""
    plan = make_plan(Spec(kv_heads=1, head_size=8, key_group=8, value_group=8, key_bits=8, key_outliers=0))
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    key = halves[:, None] + torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 253.5, 254.5, 255.0])
    pages, expected = torch.zeros(2, 4096, plan.layout.page_bytes, dtype=torch.uint8)
    cpu.store((pages,), plan, torch.arange(65536), (key, -key))
    reference.store((expected,), plan, torch.arange(65536), (key, -key))
    assert_same_pages(pages, expected, plan, torch.arange(65536), (key, -key))


# --- Wrong input ---


@pytest.fixture
def case() -> Case:
    return make_case(Spec(seqs=((70, 3), (20, 1))))


def test_refuses_wrong_tensors(case: Case) -> None:
    batch, output = case.batch, torch.empty_like(case.query)
    wrong = {
        "pages": replace(case, pages=(case.pages[0][:, :-1],)),
        "pages must be uint8": replace(case, pages=(case.pages[0].view(torch.int8),)),
        "2 pages were given": replace(case, pages=case.pages * 2),
        "query must be": replace(case, query=case.query[:, :-1]),
        "query must be FP32": replace(case, query=case.query.double()),
        "contiguous heads": replace(case, query=case.query.transpose(0, 2).contiguous().transpose(0, 2)),
        "seq_lens must be": replace(case, batch=replace(batch, seq_lens=batch.seq_lens.long())),
        "query_start_loc must be": replace(case, batch=replace(batch, query_start_loc=batch.query_start_loc[::2])),
        "do not fit together": replace(case, batch=replace(batch, block_table=batch.block_table[:2])),
        "block_table must be": replace(case, batch=replace(batch, block_table=batch.block_table.t())),
    }
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            bad.run(cpu)
    with pytest.raises(ValueError, match="output must be like query"):
        case.run(cpu, output.half())
    with pytest.raises(ValueError, match="output must be like query"):
        case.run(cpu, output[1:])


def test_refuses_indices_out_of_range(case: Case) -> None:
    batch = case.batch

    def changed(**tensors: torch.Tensor) -> Case:
        return replace(case, batch=replace(batch, **tensors))

    table = batch.block_table.clone()
    table[0, 1] = case.pages[0].shape[0]
    lengths = {"longer than its row": 10**6, "must count the query tokens": 2}
    for message, length in lengths.items():
        seq_lens = batch.seq_lens.clone()
        seq_lens[0] = length
        with pytest.raises(ValueError, match=message):
            changed(seq_lens=seq_lens).run(cpu)
    with pytest.raises(ValueError, match="names a block"):
        changed(block_table=table).run(cpu)
    for starts in ([0, 3, 2, 4, 4], [-1, 3, 4, 4, 4], [0, 3, 4, 4, 99]):
        with pytest.raises(ValueError, match="query_start_loc"):
            changed(query_start_loc=torch.tensor(starts, dtype=torch.int32)).run(cpu)
    projection = case.plan.projection
    short = replace(projection.rope, cos=projection.rope.cos[:64], sin=projection.rope.sin[:64])
    plan = replace(case.plan, projection=replace(projection, rope=short))
    with pytest.raises(ValueError, match="rotary table"):
        replace(case, plan=plan).run(cpu)


def test_refuses_wrong_latents(case: Case) -> None:
    x, slots = torch.zeros(4, 2, 64), torch.arange(4)

    def store(slots=slots, key=x, value=x) -> None:
        cpu.store(case.pages, case.plan, slots, (key, value))

    for message, arguments in {
        "slot_mapping must be": {"slots": slots.int()},
        "do not fit together": {"slots": slots[:3]},
        "numbers per token": {"key": x[:, :1]},
        "must be contiguous": {"value": torch.zeros(4, 2, 128)[..., ::2]},
        "input 0 must be FP32": {"key": x.double()},
        "names a slot": {"slots": slots + 10**6},
    }.items():
        with pytest.raises(ValueError, match=message):
            store(**arguments)


def test_refuses_wrong_plans(case: Case) -> None:
    plan, projection = case.plan, case.plan.projection
    for message, changes in {
        "kv heads": {"num_heads": 7},
        "up_key must be FP32": {"projection": replace(projection, up_key=projection.up_key.half())},
        "the value terms have 64 channels, expected 8": {
            "projection": replace(projection, up_value=projection.up_value[:, :8])
        },
        "rotation of 32 channels does not fit": {"rotation": hadamard_rotation(32, 0)},
    }.items():
        with pytest.raises(ValueError, match=message):
            replace(case, plan=replace(plan, **changes)).run(cpu)
    wide = PageLayout((AllocatedFormat(528, (((8, 8), (4, 256), (2, 8)),)),), 16)
    up = torch.zeros(1, 528, 64)
    terms = {"key_terms": (LatentTerm(0, 0),), "value_terms": (LatentTerm(0, 0),)}
    with pytest.raises(ValueError, match="cannot be cut into bands of 256 channels"):
        cpu_plan.CpuPlan(AttentionLayerPlan((wide,), LayerProjection(up, up), 2, 1.0, **terms))


def test_refuses_terms_that_do_not_fit_together() -> None:
    plan = make_plan(Spec(kind="deltas", earlier=(4, 2)))
    first, second, own = plan.key_terms
    narrow = PageLayout((StreamFormat(1, 64, 4, 32),), 16)
    runs = PageLayout((AllocatedFormat(192, (((4, 16),),)),), 16)
    for message, changes in {
        "must start with one that does not add": {"key_terms": (second, own)},
        "name a page or stream that is not there": {"key_terms": (first, replace(second, page=3), own)},
        "channels in groups of .* cannot be added": {"layouts": (plan.layout, plan.layouts[1], narrow)},
        "different bits cannot be added": {"layouts": (plan.layout, plan.layouts[1], runs)},
        "one block size": {"layouts": (plan.layout, plan.layouts[1], replace(plan.layouts[2], block_size=32))},
        "have 384 channels, expected 192": {"value_terms": (first, replace(own, adds=False))},
        "the prediction's matrix must be": {"prediction": Prediction((first,), torch.zeros(1, 192, 24))},
    }.items():
        with pytest.raises(ValueError, match=message):
            replace(plan, **changes)


def test_forgets_dead_plans() -> None:
    before = len(cpu_plan.prepare.kept), len(cpu_plan.tiled_table.kept)
    case = make_case(Spec())
    case.run(cpu)
    assert (len(cpu_plan.prepare.kept), len(cpu_plan.tiled_table.kept)) == (before[0] + 1, before[1] + 1)
    del case
    assert (len(cpu_plan.prepare.kept), len(cpu_plan.tiled_table.kept)) == before


# --- OpenMP ---


def test_shares_torchs_threads() -> None:
    script = """
import torch
from pathlib import Path
torch.set_num_threads(3)
from xquant_vllm.attention.cpu import kernels as cpu, library
def pool():
    return sum("Name" in line for task in Path("/proc/self/task").iterdir() for line in (task / "status").open())
assert library.num_threads() == 3, library.num_threads()
torch.set_num_threads(2)
assert library.num_threads() == 2, library.num_threads()
runtimes = library._mapped_openmp_runtimes()
assert len(runtimes) == 1, runtimes
from tests.attention.attention_cases import Spec, make_case
case = make_case(Spec(seqs=((2000, 1),)))
torch.ones(1 << 22).add(1)  # torch's threads are up
before = pool()
case.run(cpu)
assert pool() == before, (before, pool())
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
