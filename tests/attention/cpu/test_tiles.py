"""AMX: everything but scores of BF16 queries has the bits of VNNI, and these are what the twin says."""

from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Case, Spec, make_case, random_spec
from tests.attention.cpu.twin import twin
from tests.attention.integer_case import on_integers
from tests.cpu_kernels import assert_close, bits, has_kernels, using
from xquant_vllm.attention import reference

if not has_kernels():
    pytest.skip("no kernels", allow_module_level=True)

from xquant_vllm.attention.cpu import kernels as cpu
from xquant_vllm.attention.cpu.plan import CpuPlan

AMX_SETS = ("amx", "amx-emulated")


def assert_bits_of_vnni(case: Case, amx: str) -> None:
    outputs = []
    for isa in ("vnni", amx):
        with using(isa) as there:
            if not there:
                pytest.skip(f"this machine has no {isa}")
            outputs.append(case.run(cpu))
    assert torch.equal(bits(outputs[0]), bits(outputs[1]))


@pytest.mark.parametrize("amx", AMX_SETS)
@pytest.mark.parametrize("seed", range(200, 240))
def test_all_has_the_bits_of_vnni(amx: str, seed: int) -> None:
    """But scores of BF16 queries."""
    spec = random_spec(seed)
    if spec.dtype == torch.bfloat16:
        spec = replace(spec, dtype=torch.float32)
    assert_bits_of_vnni(make_case(spec), amx)


EXACT_KEYS = {
    "decode": Spec(seqs=((700, 1), (1, 1), (65, 1))),
    "prefill": Spec(seqs=((300, 40), (64, 64)), group=2),
    "17 rows": Spec(seqs=((300, 17),), group=1),
    "32 rows": Spec(seqs=((90, 4),), group=8),
    "2 bits, groups of 32": Spec(seqs=((300, 2),), key_group=32, key_bits=2),
    "3 bits, narrow head": Spec(seqs=((300, 2),), head_size=24, key_group=24, value_group=24, key_bits=3),
    "groups of 8": Spec(seqs=((130, 2),), head_size=16, key_group=8, value_group=8),
    "heads of 72": Spec(seqs=((300, 3),), head_size=72, key_group=72, value_group=72, bias=False),
    "heads of 128": Spec(seqs=((300, 3),), head_size=128, key_group=128, value_group=128),
    "heads of 160": Spec(seqs=((300, 3),), kv_heads=1, head_size=160, key_group=160, value_group=160),
    "partly turned": Spec(seqs=((300, 3),), rotary_size=32),
}


def exact_keys(spec: Spec) -> Case:
    """A case whose keys are whole numbers below 256, which BF16 holds, and whose scores FP32 holds.

    Latents are codes, because every group has the smallest and the largest one, with an up-projection of -1, 0 and 1.
    """
    case = make_case(replace(spec, key_outliers=0))
    generator = torch.Generator().manual_seed(1)
    stream = case.plan.layout.streams[0]
    projection = case.plan.projection
    largest = 2**spec.key_bits - 1
    starts = case.batch.query_start_loc.tolist()
    for index, (length, _) in enumerate(spec.seqs):
        assert starts[index + 1] > starts[index]
        positions = torch.arange(length)
        slots = case.batch.block_table[index].long()[positions // spec.block_size] * spec.block_size
        latents = torch.randint(0, largest + 1, (length, stream.num_heads, stream.width), generator=generator).float()
        latents[..., :: spec.key_group] = 0
        latents[..., 1 :: spec.key_group] = largest
        values = torch.randn(length, spec.kv_heads * spec.head_size, generator=generator)
        reference.store(case.pages, case.plan, slots + positions % spec.block_size, (latents, values))
    up = torch.zeros_like(projection.up_key)
    for channel in range(6):
        rows = torch.randint(0, stream.width // 8, (up.shape[0], 1, up.shape[2]), generator=generator) * 8 + channel + 2
        up.scatter_(1, rows, torch.randint(0, 2, rows.shape, generator=generator).float() * 2 - 1)
    up[:, :: spec.key_group] = 127  # of what is always 0: so that the unit is 1
    rope = projection.rope
    assert rope is not None
    rope = replace(rope, cos=torch.ones_like(rope.cos), sin=torch.zeros_like(rope.sin))
    query = torch.randint(-4, 5, case.query.shape, generator=generator).to(case.query.dtype)
    plan = replace(case.plan, scale=1 / 64, projection=replace(projection, up_key=up, rope=rope))
    return replace(case, plan=plan, query=query)


@pytest.mark.parametrize("amx", AMX_SETS)
@pytest.mark.parametrize("name", EXACT_KEYS)
def test_bfloats_that_are_exact_have_the_bits_of_vnni(amx: str, name: str) -> None:
    case = exact_keys(replace(EXACT_KEYS[name], dtype=torch.bfloat16))
    integers = CpuPlan(case.plan, with_integers=True, with_tiles=True).integer_keys
    assert integers is not None
    assert (integers.first_tiles >= 0).all()
    assert_bits_of_vnni(case, amx)


@pytest.mark.parametrize("amx", AMX_SETS)
@pytest.mark.parametrize("head_size", [24, 64])
@pytest.mark.parametrize("kind", ["x", "deltas"])
def test_keys_in_bytes_have_the_bits_of_vnni(amx: str, kind: str, head_size: int) -> None:
    """Their scores are FP32 in both."""
    spec = Spec(
        seqs=((300, 3), (64, 40), (1, 1)), kv_heads=3, head_size=head_size, kind=kind, earlier=(4, 2), hidden_size=328,
        key_group=8, key_outliers=0, norm=True,
    )  # fmt: skip
    case = make_case(spec)
    assert CpuPlan(case.plan, with_integers=True).byte_keys is not None
    assert_bits_of_vnni(case, amx)


@pytest.mark.parametrize("amx", AMX_SETS)
@pytest.mark.parametrize("name", EXACT_KEYS)
def test_scores_of_rounded_keys(amx: str, name: str) -> None:
    case = on_integers(make_case(replace(EXACT_KEYS[name], dtype=torch.bfloat16)))
    with using(amx) as there:
        if not there:
            pytest.skip(f"this machine has no {amx}")
        assert_close(case.run(cpu), case.run(twin()))


@pytest.mark.parametrize("seed", range(300, 330))
def test_object_code_does_what_its_source_says(seed: int) -> None:
    """What is compiled for AMX, against the same source with its AMX instructions in plain C++."""
    case = make_case(random_spec(seed))
    outputs = []
    for isa in AMX_SETS:
        with using(isa) as there:
            if not there:
                pytest.skip(f"this machine has no {isa}")
            outputs.append(case.run(cpu))
    assert torch.equal(bits(outputs[0]), bits(outputs[1]))
