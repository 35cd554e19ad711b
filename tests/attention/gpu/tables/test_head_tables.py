"""What the decode kernel for latents per head reads of a layer, and which layers it leaves alone."""

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import layers
from tests.attention.attention_cases import Spec, make_plan
from tests.attention.gpu.compile_cases import SPECS
from xquant_vllm.attention.gpu.gpu_plan import prepare
from xquant_vllm.attention.gpu.limits import SHARED_MEMORY
from xquant_vllm.attention.gpu.tables import head_tables as tables
from xquant_vllm.attention.gpu.tables.head_tables import PARAMETER_SCALE, head_tables, refusal
from xquant_vllm.attention.gpu.tables.pairs import arranged, pair_columns
from xquant_vllm.codec.packing import pack

TAKEN = Spec(dtype=torch.float16)
REFUSED = {
    "FP32": {"dtype": torch.float32},
    "no RoPE": {"rope": "none"},
    "a norm behind a bias": {"norm": True, "bias": True},
    "several layers": {"kind": "chain", "earlier": (4,)},
    "share a latent": {"kind": "x"},
    "keys share a latent": {"joint": True, "key_group": 32, "value_group": 32},
    "in keys or in values alone": {"allocated": 0.5, "seed": 3},
    "codes of keys have 16 bits, not 8, 4, 3 or 2": {"key_bits": 16},
    "codes of values have 16 bits": {"value_bits": 16},
    "rows of keys have 27 bytes": {"head_size": 72, "key_group": 72, "value_group": 72, "key_bits": 3},
    "values have 2 scales per head": {"value_group": 32},
    "keys have 2 outlier channels, more than 1": {"key_outliers": 2},
    "values have 1 outlier channels, more than 0": {"value_outliers": 1},
    "heads have 256 channels, more than 128": {"head_size": 256, "key_group": 256, "value_group": 256},
    "17 query heads": {"group": 17},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    spec = replace(TAKEN, **REFUSED[reason])
    plan = make_plan(spec)
    assert reason in str(refusal(plan, spec.dtype))
    gpu_plan = prepare(plan, spec.dtype)
    assert gpu_plan.heads is None
    assert reason in str(gpu_plan.general_because)


def test_refuses_angles_that_are_not_proportional() -> None:
    plan = make_plan(TAKEN)
    rope = plan.projection.rope
    assert rope is not None
    bent = replace(rope, cos=rope.cos.roll(30, 0), sin=rope.sin)
    plan = replace(plan, projection=replace(plan.projection, rope=bent))
    assert "not proportional" in str(refusal(plan, torch.float16))


@pytest.mark.parametrize(("limit", "bias", "taken"), [(101376, True, True), (80000, False, True), (80000, True, False)])
def test_shared_memory(limit: int, bias: bool, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute capability 8.9 has room for the served default of heads of 128 and a bias besides."""
    monkeypatch.setattr(tables, "shared_memory", lambda device: limit)
    plan = make_plan(replace(TAKEN, head_size=128, key_group=128, value_group=128, bias=bool(bias)))
    reason = refusal(plan, torch.float16)
    assert (reason is None) == taken
    assert taken or "shared memory, more than the 80000 of this GPU" in str(reason)


@pytest.mark.parametrize(("tensor_memory", "taken"), [(False, True), (True, False)])
def test_shared_memory_beside_tensor_memory(tensor_memory: bool, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute capability 10.0 has as much as 9.0, but all operands of sums stay in it: 275,504 bytes of these runs."""
    monkeypatch.setattr(tables, "shared_memory", lambda device: SHARED_MEMORY[100])
    monkeypatch.setattr(tables, "tensor_memory", lambda: tensor_memory)
    plan = make_plan(SPECS["allocated"])
    assert (refusal(plan, torch.bfloat16) is None) == taken


@pytest.mark.parametrize(("bits", "taken"), [(2, True), (3, True), (4, False)])
def test_shared_memory_of_calibrated_latents(bits: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "shared_memory", lambda device: 101376)
    plan = layers.make_layer(layers.LLAMA_3, f"allocated {bits}", 128, 16, torch.device("cpu"), 0)
    assert (refusal(plan, torch.bfloat16) is None) == taken


@pytest.mark.parametrize("outliers", [0, 1])
@pytest.mark.parametrize("channels", [8, 24, 80, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pieces(bits: int, channels: int, outliers: int) -> None:
    """Subnormal numbers at their places times pieces are the product of codes, but for what is taken off."""
    plan = make_plan(
        replace(
            TAKEN, head_size=channels, key_group=channels, value_group=channels, key_bits=bits, key_outliers=outliers
        )
    )
    columns = pair_columns(channels, plan.projection.rope)
    made = head_tables(plan, columns)
    codes = torch.randint(1 << bits, (5, channels))
    codes[:, :outliers] = 0
    units = pack(codes, bits).view(torch.int16).int() & 0xFFFF
    units = torch.nn.functional.pad(units, (0, made.key.units - units.shape[1]))
    units[:, 0] |= made.middle
    product = torch.zeros(5, columns.numel())
    for piece, up in enumerate(made.up[1, : made.key.rows].unflatten(0, (-1, made.key.units))):
        mask = (1 << bits) - 1 << bits * (piece // 2)
        numbers = (units >> 8 * (piece % 2) & mask).to(torch.int16).view(torch.float16)
        product += numbers.float() @ up.float()
    product += made.middle / PARAMETER_SCALE * made.up[1, made.key.rows].float()
    expected = codes.float() @ arranged(plan.projection.up_key, columns)[1]
    found = product * made.factors[1, 0]
    assert (found - expected).norm() <= 1e-3 * expected.norm()
