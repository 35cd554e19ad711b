"""The Triton kernels of attention, under Triton's interpreter, against the reference."""

from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Case, Spec, make_case, random_spec
from xquant_vllm.attention import reference
from xquant_vllm.attention.batch import Decoding, DecodingRun
from xquant_vllm.attention.gpu import launch, tiling
from xquant_vllm.attention.gpu.gpu_plan import _gpu_plan, prepare
from xquant_vllm.attention.gpu.prefill.prefill import prefill
from xquant_vllm.attention.gpu.prefill.step import PrefillStep, View


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bits of FP32, or for what operands and outputs in 16 bits leave."""
    assert actual.dtype == expected.dtype
    assert actual.isfinite().all()
    allowed = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[expected.dtype]
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= allowed, f"relative error {error}"


def with_lengths(case: Case) -> Case:
    """The case with what the host knows of its sequences; padding has no tokens."""
    starts = case.batch.query_start_loc
    new = (starts[1:] - starts[:-1]).tolist()
    lengths = tuple(
        (count, length if count else 0) for count, length in zip(new, case.batch.seq_lens.tolist(), strict=True)
    )
    return replace(case, batch=replace(case.batch, lengths=lengths))


def short(spec: Spec) -> Spec:
    """The interpreter takes milliseconds for an operation: a few tokens, and groups that make few bands."""
    seqs = tuple((min(length, 50) + new, new) for length, new in spec.seqs[:2] if new <= 17) or ((20, 2),)
    small = spec.hidden_size // 8 if spec.kind in ("x", "deltas") else spec.kv_heads * spec.head_size // 8
    return replace(spec, seqs=seqs, allocated=1.0 if small > 16 and spec.kind != "deltas" else spec.allocated)


@pytest.mark.parametrize("seed", range(20))
def test_attention(seed: int) -> None:
    spec = short(random_spec(seed))
    print(spec)
    case = make_case(spec)
    assert_close(case.run(launch), case.run(reference))


class Prefill:
    """All sequences through a workspace of a few tokens."""

    def __init__(self, room: int) -> None:
        self.room = room

    def paged_attention(self, query, pages, plan, batch, output, inputs=None) -> None:
        batch = replace(batch, decode_tokens=0)
        rounds = PrefillStep(batch, [View.of(plan)], self.room).rounds(View.of(plan))
        prefill(query, pages, plan, prepare(plan, query.dtype), batch, rounds, output, inputs, self.room)


@pytest.mark.parametrize("seed", range(60, 70))
def test_prefill(seed: int) -> None:
    spec = short(random_spec(seed))
    print(spec)
    case = make_case(spec)
    room = (16, 50, 100, 1000)[seed % 4]
    assert_close(with_lengths(case).run(Prefill(room)), case.run(reference))


@pytest.mark.parametrize("seed", range(80, 92))
def test_exact_prompts(seed: int) -> None:
    """Tokens that are attended to exactly are not in the pages."""
    spec = replace(short(random_spec(seed)), exact_from=2)
    print(spec)
    case = with_lengths(make_case(spec))
    assert_close(case.run(launch), case.run(reference))


def test_exact_prompt_in_spans() -> None:
    """Context and prompt pass through the workspace in several rounds."""
    case = with_lengths(make_case(Spec(seqs=((90, 40), (20, 20), (60, 2)), bias=True, window=70, exact_from=2)))
    assert_close(case.run(Prefill(50)), case.run(reference))


SPECS = {
    "many splits": Spec(seqs=((700, 1), (1, 1)), kv_heads=1),
    "speculative": Spec(seqs=((90, 4), (33, 4)), kv_heads=2, group=4),
    "group of 16": Spec(seqs=((40, 2),), kv_heads=1, group=16, head_size=64),
    "head of 256": Spec(seqs=((70, 1),), head_size=256, key_group=256, value_group=256, key_outliers=0, norm=True),
    "values of several groups": Spec(seqs=((70, 1),), head_size=128, value_group=32),
    "sinks": Spec(seqs=((70, 2), (3, 3)), sinks=True, bias=True),
    "sinks, no RoPE": Spec(seqs=((70, 2),), sinks=True, bias=True, rope="none", kind="x"),
    "folded": Spec(
        seqs=((70, 2), (3, 3)), folded=True, sinks=True, bias=True, head_size=72, value_group=72, key_group=72
    ),
    "folded, runs": Spec(seqs=((70, 1),), folded=True, allocated=1.0, seed=1),
    "folded, few channels stored": Spec(seqs=((70, 1),), folded=True, allocated=1.0, head_size=128, bias=True, seed=7),
    "folded, several groups": Spec(seqs=((70, 1),), folded=True, value_group=32),
    "folded, outliers": Spec(seqs=((70, 1),), folded=True, value_outliers=2),
    "folded, 16 bits": Spec(seqs=((40, 1),), folded=True, key_bits=16, value_bits=16, key_outliers=0),
    "16 bits": Spec(seqs=((40, 1),), key_bits=16, value_bits=16, key_outliers=0),
}


@pytest.mark.parametrize("name", SPECS)
def test_special(name: str) -> None:
    case = make_case(SPECS[name])
    assert_close(case.run(launch), case.run(reference))


@pytest.mark.parametrize("name", [name for name in SPECS if name.startswith("folded")])
def test_special_prefill(name: str) -> None:
    case = make_case(SPECS[name])
    assert_close(with_lengths(case).run(Prefill(50)), case.run(reference))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("allocated", [0.0, 1.0])
@pytest.mark.parametrize("folded", [False, True])
def test_16_bit_operands(dtype: torch.dtype, allocated: float, folded: bool) -> None:
    case = make_case(Spec(seqs=((90, 1), (70, 70)), dtype=dtype, allocated=allocated, folded=folded, seed=3))
    assert_close(with_lengths(case).run(launch), case.run(reference))


def test_decodes_and_prefills() -> None:
    """Sequences with few tokens decode, behind others as well; the others prefill."""
    spec = Spec(seqs=((90, 1), (20, 3), (100, 60), (40, 2), (9, 9), (5, 0), (35, 1)), group=3, decode_tokens=3)
    case = with_lengths(make_case(spec))
    assert case.batch.decoding == Decoding(DecodingRun(0, 2, 3), (DecodingRun(3, 4, 2), DecodingRun(5, 9, 1)))
    assert_close(case.run(launch), case.run(reference))


# Drafted tokens, query heads of a kv head: more rows than a tile has.
LONG_DRAFTS = [(16, 4), (1, 48), *(pytest.param(*of, marks=pytest.mark.nightly) for of in ((8, 7), (8, 8), (4, 16)))]


@pytest.mark.parametrize(("drafted", "group"), LONG_DRAFTS)
def test_long_drafts(drafted: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They decode, too. The host takes all drafted tokens for kept: of such lengths nothing may be computed."""
    monkeypatch.setattr(tiling, "_PROGRAMS", 6)  # the interpreter takes milliseconds for a program
    new = 1 + drafted
    spec = Spec(
        seqs=((new + 14, new), (new + 2, new), (new + 20, new + 9), (new + 6, new)), kv_heads=1, group=group,
        head_size=16, key_group=16, value_group=16, hidden_size=64, decode_tokens=new,
    )  # fmt: skip
    case = with_lengths(make_case(spec))
    assert case.batch.lengths is not None
    overstated = tuple((count, length + drafted if count == new else length) for count, length in case.batch.lengths)
    case = replace(case, batch=replace(case.batch, lengths=overstated))
    assert_close(case.run(launch), case.run(reference))

    monkeypatch.setattr(launch, "prefill", None)
    case = make_case(replace(spec, seqs=spec.seqs[:2]))
    known = (overstated[0], overstated[1], (0, 0), (0, 0))
    case = replace(case, batch=replace(case.batch, lengths=known, max_query_len=new))
    assert_close(case.run(launch), case.run(reference))


def test_overstated_length() -> None:
    """The host may take a decoding sequence for longer than it is: what is not there is not read."""
    case = with_lengths(make_case(Spec(seqs=((90, 1), (100, 60), (40, 1)))))
    assert case.batch.lengths is not None
    overstated = ((1, 200), (60, 100), (1, 75), *case.batch.lengths[3:])
    expected = case.run(reference)
    assert_close(replace(case, batch=replace(case.batch, lengths=overstated)).run(launch), expected)


def test_wide_latents_stay_apart() -> None:
    """A wide latent's values are rematerialized, a narrow one's are weighed as latents."""
    narrow, wide = make_case(Spec()).plan, make_case(Spec(joint=True, kv_heads=8, head_size=64, key_group=64)).plan
    assert prepare(narrow, torch.float32).absorb_value
    assert not prepare(wide, torch.float32).absorb_value


def test_folded_latents_are_not_projected() -> None:
    """Unless unpacking them is left to the product: in several bands, or with outliers."""
    assert not prepare(make_case(Spec(folded=True)).plan, torch.float32).project_value
    assert prepare(make_case(Spec(folded=True, value_group=32)).plan, torch.float32).project_value
    assert prepare(make_case(Spec()).plan, torch.float32).project_value


def test_one_latent_is_unpacked_once() -> None:
    for spec in (Spec(kind="x"), Spec(kind="deltas", earlier=(4,)), Spec(kind="chain", earlier=(4,), joint=True)):
        assert prepare(make_case(spec).plan, torch.float32).shared
    assert not prepare(make_case(Spec()).plan, torch.float32).shared


def test_forgets_dead_plans() -> None:
    """Tables go together with the plan, after a call as well."""
    before = len(_gpu_plan.kept)
    case = make_case(Spec(seqs=((20, 1),)))
    case.run(launch)
    assert len(_gpu_plan.kept) == before + 1
    del case
    assert len(_gpu_plan.kept) == before
