"""Counts of instructions: those of tiles are known."""

from collections.abc import Iterator

import pytest
import torch

from tests.cpu_kernels import has_kernels, trap, using

if not has_kernels():
    pytest.skip("no kernels", allow_module_level=True)

import count_instructions

PRODUCTS = 16 + 8 + 8  # of keys, scores and values
LOADS_AND_STORES = 2 * (4 + 2 + 8) + 2 * (2 * 3 + 2) + 4 * (1 + 2 + 2)
ZEROED = 16 + 4 + 8
# An instruction that the system interrupts, say for a page of memory, may be counted twice: a 24th of one per tile.
INTERRUPTED = 0.1


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Other threads are not counted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", [4, 2])
def test_instructions_of_tiles(bits: int) -> None:
    """Heads of 64: keys are 4 x 4 tiles of one depth, scores 4 of two, values 4 of two parts; one set-up a stretch."""
    with using("amx") as there:
        if not there:
            pytest.skip("this machine cannot run the code for AMX")
        counts = count_instructions.per_tile(trap(), bits)
    assert counts["tile products"] == pytest.approx(PRODUCTS, abs=INTERRUPTED)
    assert counts["tile loads and stores"] == pytest.approx(LOADS_AND_STORES, abs=INTERRUPTED)
    assert counts["other of tiles"] == pytest.approx(ZEROED + 2 / 4, abs=INTERRUPTED)
    assert counts["dot products"] == 0


def test_instructions_of_vnni() -> None:
    """Keys are 64 x 4 vectors of 16 products, values 3 x 4 of 16 quads of tokens in two parts."""
    with using("vnni") as there:
        if not there:
            pytest.skip("this machine has no VNNI")
        counts = count_instructions.per_tile(trap(), 4)
    assert counts["dot products"] == pytest.approx(64 * 4 * 16 + 3 * 4 * 16 * 2, abs=INTERRUPTED)
    assert counts["tile products"] == 0
