"""What the roofs of the CPU benchmarks are computed from."""

import pytest
import torch

from benchmarks.cpu.layers import BLOCK_SIZE, MODELS, Model, decode_batch, filled_pages, latents, make_plan
from benchmarks.cpu.work import Roofs, Work, decode_work, store_work
from xquant_vllm.attention import reference

try:
    from xquant_vllm.attention.cpu import kernels as cpu
    from xquant_vllm.attention.cpu import library
except OSError as error:
    pytest.skip(f"no kernels: {error}", allow_module_level=True)

SMALL = Model("small", 2, 64, 6, 2, 32)


# With VNNI, keys of X in 4 bits are rounded to bytes, which the reference does not do.
@pytest.mark.parametrize(("holds", "bits", "tolerance"), [("latents", 4, 2e-3), ("x", 8, 2e-3), ("x", 4, 2e-2)])
def test_layers_attend(holds: str, bits: int, tolerance: float) -> None:
    plan = make_plan(SMALL, holds, bits, 300)
    batch = decode_batch(2, 300)
    pages = filled_pages(plan, 2 * 3, 2)
    assert pages[0].data_ptr() != pages[1].data_ptr()
    query = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    outputs = [torch.empty_like(query) for _ in range(3)]
    for kernels, of_layer, output in zip((cpu, cpu, reference), (pages[0], pages[1], pages[1]), outputs, strict=True):
        kernels.paged_attention(query, (of_layer,), plan, batch, output)
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[1], outputs[2], atol=tolerance, rtol=tolerance)


def test_work_of_a_decode_step() -> None:
    plan = make_plan(MODELS["smollm2-135m"], "latents", 4, BLOCK_SIZE)
    for isa in ("avx2", "vnni"):
        if not library.set_isa(isa):
            continue
        work = decode_work(plan, 8, 512)
        tokens = 8 * 512
        assert work.bytes == tokens * plan.layout.bytes_per_token
        common = 2 * 64 + 3 * 64 + 3 * 10
        if isa == "avx2":
            assert work.fp32 == tokens * 3 * (common + 64 * 64 + 3 * 64)
        else:
            # Scale and zero, and one outlier channel.
            assert work.fp32 == tokens * 3 * (common + 3 * 64)
            assert (work.int8, work.int16) == (tokens * 3 * (64 * 64 + 2 * 3 * 64), 0)
    library.set_isa(None)


def test_roofs() -> None:
    roofs = Roofs(bytes_per_second=10.0, fp32=4.0, int8=16.0)
    assert roofs.seconds(Work(bytes=100.0, fp32=4.0, int16=8.0, int8=16.0)) == (10.0, "memory")
    assert roofs.seconds(Work(bytes=1.0, fp32=4.0, int16=8.0, int8=16.0)) == (3.0, "arithmetic")


def test_bytes_of_a_store() -> None:
    plan = make_plan(SMALL, "latents", 4, 16)
    assert [x.shape for x in latents(plan, 5)] == [(5, 64)] * 2
    assert store_work(plan, 5).bytes == 5 * (2 * 2 * 64 + plan.layout.bytes_per_token)
