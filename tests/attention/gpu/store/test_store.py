"""The Triton store against the reference; on a GPU, or without one in Triton's interpreter."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from tests.attention.attention_cases import Spec, make_plan, random_latents, random_spec
from tests.attention.stored_pages import StoreCase, assert_same_pages, make_store_case
from xquant_vllm.attention import reference
from xquant_vllm.attention.gpu import kernels, workspace
from xquant_vllm.attention.gpu.device.error_scale import scale_value
from xquant_vllm.attention.gpu.store import store as gpu
from xquant_vllm.attention.gpu.store.store_tables import prepare_store
from xquant_vllm.attention.gpu.tables.rotation_tables import rotation_tables
from xquant_vllm.attention.latents import LatentTerm, Prediction
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat, scale_values
from xquant_vllm.codec.layout import PageLayout, Stream, StreamFormat
from xquant_vllm.codec.pages import store_latents
from xquant_vllm.codec.rotation import hadamard_rotation
from xquant_vllm.projection.rematerialize import LayerProjection

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _moved(x: torch.Tensor) -> torch.Tensor:
    """On the device, with the same strides; poison between the rows included."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def _moved_plan(plan: AttentionLayerPlan) -> AttentionLayerPlan:
    """What the store reads of a plan, on the device."""
    up_value = plan.projection.up_value
    projection = LayerProjection(plan.projection.up_key.to(DEVICE), None if up_value is None else up_value.to(DEVICE))
    rotation, prediction = plan.rotation, plan.prediction
    if rotation is not None:
        rotation = rotation.to(DEVICE)
    if prediction is not None and prediction.matrix is not None:
        prediction = replace(prediction, matrix=prediction.matrix.to(DEVICE))
    return replace(plan, projection=projection, rotation=rotation, prediction=prediction)


def store(
    pages: Sequence[torch.Tensor], plan: AttentionLayerPlan, slots: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> None:
    if DEVICE.type == "cpu":
        gpu.store(pages, plan, slots, inputs)
        return
    moved = [_moved(page) for page in pages]
    gpu.store(moved, _moved_plan(plan), slots.to(DEVICE), [_moved(x) for x in inputs])
    pages[0].copy_(moved[0])


@pytest.fixture(params=["few", "many"])
def tokens(request, monkeypatch) -> None:
    """Programs of one token, and of several."""
    monkeypatch.setattr(gpu, "_MANY_TOKENS", 1 if request.param == "many" else 10**6)


# --- Every option ---


@pytest.mark.parametrize("seed", range(30))
def test_store(seed: int, monkeypatch) -> None:
    spec, kind = random_spec(seed), ("normal", "special", "constant")[seed % 3]
    print(spec)
    monkeypatch.setattr(gpu, "_MANY_TOKENS", (1, 10**6)[seed % 2])
    scale_groups = sum(tables.scale_groups.shape[0] for tables in gpu.prepare_store(make_plan(spec)).streams)
    # The interpreter takes milliseconds a program.
    make_store_case(spec, 2 if scale_groups > 8 else (1, 3, 5, 9)[seed % 4], kind).check(store)


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits(bits: int, dtype: torch.dtype) -> None:
    """Inputs that are slices, with what is no number in them."""
    spec = Spec(
        kv_heads=1, head_size=48, key_bits=bits, value_bits=bits, key_group=24, value_group=48, key_outliers=3,
        value_outliers=0, strided=True, dtype=dtype, seed=bits,
    )  # fmt: skip
    make_store_case(spec, 5, "special").check(store)


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize("kind", ["normal", "special", "constant"])
@pytest.mark.parametrize("joint", [False, True])
def test_allocated(joint: bool, kind: str) -> None:
    spec = Spec(kv_heads=2, head_size=128, joint=joint, allocated=1.0, dtype=torch.bfloat16, strided=True, seed=3)
    make_store_case(spec, 3, kind).check(store)


def test_ties() -> None:
    """Numbers halfway between two codes go to the even one."""
    plan = make_plan(Spec(kv_heads=1, head_size=8, key_group=8, value_group=8, key_bits=8, key_outliers=0))
    halves = torch.arange(0, 65536, 97, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    key = halves[:, None] + torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 253.5, 254.5, 255.0])
    slots = torch.arange(len(key))
    pages, expected = torch.zeros(2, len(key) // 16 + 1, plan.layout.page_bytes, dtype=torch.uint8)
    store((pages,), plan, slots, (key, -key))
    reference.store((expected,), plan, slots, (key, -key))
    assert_same_pages(pages, expected, plan, slots, (key, -key))


@triton.jit
def _scale_values(scales, values, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(values + index, scale_value(tl.load(scales + index).to(tl.float32)))


def test_scale_values() -> None:
    """What scales of allocated streams stand for is what the codec says."""
    scales, values = torch.arange(256, dtype=torch.uint8, device=DEVICE), torch.zeros(256, device=DEVICE)
    _scale_values[(1,)](scales, values, COUNT=256)
    assert torch.allclose(values.cpu(), scale_values(), rtol=1e-6, atol=0)


# --- Rotation ---


@pytest.mark.parametrize("size", [8, 64, 72, 520, 576, 2880, 3072, 4096, 5120, 8192])
@pytest.mark.usefixtures("tokens")
def test_rotation(size: int) -> None:
    rotation = hadamard_rotation(size, 1)
    x = torch.randn(3, size + 8)[:, :size]
    rotated = torch.zeros(3, size, device=DEVICE)
    gpu._rotate(_moved(x), torch.tensor([5, -1, 7], device=DEVICE), rotation_tables(rotation, DEVICE), rotated)
    assert (rotated[1] == 0).all()
    expected = rotation.apply(x.double())
    for token in (0, 2):
        error = (rotated[token].cpu() - expected[token]).abs().max() / expected[token].abs().max()
        assert error < 2e-6


ROTATED = {
    "groups": {"hidden_size": 520, "key_group": 40, "key_outliers": 2},
    "two rounds of scale groups": {"hidden_size": 2080, "key_group": 16, "key_outliers": 0},
    "runs": {"hidden_size": 576, "allocated": 1.0},
    "FP16": {"hidden_size": 72, "key_group": 24, "key_bits": 16, "key_outliers": 0},
    "a large rotation": {"hidden_size": 5120, "key_group": 128, "key_bits": 2},
}


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROTATED)
def test_rotated_and_stored(name: str, dtype: torch.dtype) -> None:
    """In one kernel, whose programs use one row of memory for all of their tokens."""
    make_store_case(Spec(kind="x", dtype=dtype, strided=True, seed=2, **ROTATED[name]), 9, "normal").check(store)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padded_input(dtype: torch.dtype) -> None:
    """X as it comes through the model's code: padded to whole heads, which must not be read."""
    plan = make_plan(Spec(kind="x", hidden_size=72, key_group=24))
    x = torch.full((4, 3, 32), torch.nan, dtype=dtype)
    x.flatten(1)[:, :72] = torch.randn(4, 72)
    rows = x.flatten(1)[:, :72]
    assert gpu._rows(rows, 0, 72).data_ptr() == x.data_ptr()
    memory = torch.randint(256, (2, plan.layout.page_bytes), dtype=torch.uint8)
    StoreCase(plan, memory, (), torch.tensor([3, 30, -1, 16, 5]), (rows,)).check(store)


# --- Prediction ---


def _predicting(own: Stream, earlier: Sequence[Stream], terms: Sequence[LatentTerm], matrix: bool) -> StoreCase:
    """A layer of a chain, whatever its keys are; five tokens."""
    generator = torch.Generator().manual_seed(0)
    layouts = tuple(PageLayout((stream,), 16) for stream in (own, *earlier))
    up = torch.zeros(own.num_heads, own.width, 16)
    width = sum(layouts[term.page].streams[term.stream].width for term in terms if not term.adds)
    factor = torch.randn(own.num_heads, width, own.width, generator=generator) / width**0.5 if matrix else None
    plan = AttentionLayerPlan(
        layouts, LayerProjection(up, up), own.num_heads, 1.0, key_terms=(LatentTerm(0, 0),),
        value_terms=(LatentTerm(0, 0),), prediction=Prediction(tuple(terms), factor),
    )  # fmt: skip
    slots = torch.tensor([40, -1, 3, 47, 0])
    pages = [torch.full((3, layout.page_bytes), 0xFF, dtype=torch.uint8) for layout in layouts]
    for layout, page in zip(layouts[1:], pages[1:], strict=True):
        store_latents(page, layout, slots[slots >= 0], random_latents(layout, 4, generator))
    return StoreCase(plan, pages[0], pages[1:], slots, random_latents(layouts[0], 5, generator))


_RUNS = ((8, 16), (4, 32), (3, 16), (2, 16))
PREDICTIONS = {
    "outlier channels": ([StreamFormat(2, 96, 4, 48, 3)], [LatentTerm(1, 0)]),
    "FP16": ([StreamFormat(2, 96, 16, 96)], [LatentTerm(1, 0)]),
    "runs": ([AllocatedFormat(96, (_RUNS, ((4, 96),)))], [LatentTerm(1, 0)]),
    "one head for all": ([StreamFormat(1, 96, 3, 32)], [LatentTerm(1, 0)]),
    "deltas": ([StreamFormat(2, 96, 4, 96), StreamFormat(2, 96, 2, 96)], [LatentTerm(1, 0), LatentTerm(2, 0, True)]),
    "in a row": ([StreamFormat(2, 64, 4, 64), AllocatedFormat(32, (((4, 16),),) * 2)], [
        LatentTerm(1, 0), LatentTerm(2, 0)
    ]),
}  # fmt: skip


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize(
    ("name", "matrix"),
    # Only a matrix makes several heads of one.
    [(name, matrix) for name in PREDICTIONS for matrix in (False, True) if matrix or name != "one head for all"],
)
def test_prediction(name: str, matrix: bool) -> None:
    earlier, terms = PREDICTIONS[name]
    _predicting(StreamFormat(2, 96, 4, 96), earlier, terms, matrix).check(store)


@pytest.mark.parametrize("matrix", [False, True])
def test_prediction_from_many_outliers(matrix: bool) -> None:
    """More outlier channels than a band has otherwise."""
    _predicting(StreamFormat(1, 96, 4, 96), [StreamFormat(1, 96, 4, 96, 70)], [LatentTerm(1, 0)], matrix).check(store)


# --- Calls ---


def test_nothing_to_store() -> None:
    plan = make_plan(Spec())
    pages = torch.full((2, plan.layout.page_bytes), 7, dtype=torch.uint8)
    store((pages,), plan, torch.tensor([3, 4]), (torch.zeros(0, 128), torch.zeros(0, 128)))
    store((pages,), plan, torch.tensor([-1, -1, 4]), (torch.zeros(2, 128), torch.zeros(2, 128)))
    assert (pages == 7).all()


def test_refuses_wrong_inputs() -> None:
    plan = make_plan(Spec())
    pages = torch.zeros(1, plan.layout.page_bytes, dtype=torch.uint8)
    x = torch.zeros(1, 128)
    for message, inputs in {
        "input 1 in torch.float64: the kernels take": (x, x.double()),
        "input 0 has 64 numbers per token, the stream has 128": (x[:, :64], x),
    }.items():
        with pytest.raises(ValueError, match=message):
            gpu.store((pages,), plan, torch.tensor([0]), inputs)
    with pytest.raises(ValueError, match="a rotation of 32 channels does not fit"):
        gpu.store((pages,), replace(plan, rotation=hadamard_rotation(32, 0)), torch.tensor([0]), (x, x))


class _NoKernel:
    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **kwargs: None


def test_reads_nothing_back(monkeypatch) -> None:
    """Views alone: nothing is allocated, nothing depends on data, so that a CUDA graph can hold a call."""
    seen: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for spec in (Spec(), Spec(kind="deltas", earlier=(4, 2)), Spec(kind="chain", earlier=(4,))):
        case = make_store_case(spec, 2, "normal")
        pages = (case.memory[:, : case.plan.layout.page_bytes], *case.earlier)
        gpu.store(pages, case.plan, case.slots, case.inputs)
        for kernel in ("quantize", "rotate", "store_rotated", "subtract_terms", "subtract_product"):
            monkeypatch.setattr(gpu, kernel, _NoKernel())
        with Record():
            gpu.store(pages, case.plan, case.slots, case.inputs)
        monkeypatch.undo()
    assert set(seen) <= {"aten.view.default", "aten.view.dtype", "aten.slice.Tensor", "aten.detach.default"}


@pytest.mark.parametrize("spec", [Spec(kind="deltas", earlier=(4, 2), hidden_size=2048), Spec(kind="x")])
def test_reserves_what_it_takes(spec: Spec, monkeypatch) -> None:
    """Nothing is allocated after :func:`kernels.fix`."""
    case = make_store_case(spec, 2, "normal")
    device = torch.device("cpu")
    monkeypatch.setattr(workspace, "_buffers", {})
    monkeypatch.setattr(workspace, "_fixed", set())
    kernels.reserve(case.plan, 2, 2, torch.float32, device)
    kernels.fix(device)
    gpu.store((case.memory[:, : case.plan.layout.page_bytes], *case.earlier), case.plan, case.slots, case.inputs)


def test_forgets_dead_plans() -> None:
    before = len(prepare_store.kept)
    case = make_store_case(Spec(), 1, "normal")
    case.check(gpu.store)
    assert len(prepare_store.kept) == before + 1
    del case
    assert len(prepare_store.kept) == before


def test_fewer_tokens_take_no_more_memory() -> None:
    """Though each may have a program of its own."""
    plan = make_plan(Spec(kind="x"))
    taken = [gpu.workspace_parts(plan, count)[0][0][0] for count in (1, 100, 255, 256, 300, 2048, 8192)]
    assert taken == [1, 100, 255, 256, 256, 256, 1024]
