"""Up-projections in integers: the same function, and integers indeed."""

import pytest
import torch

from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.allocation import STEP
from xquant_vllm.codec.layout import Stream, StreamFormat
from xquant_vllm.projection.basis import factorize
from xquant_vllm.projection.integer_up import with_integer_up

HEADS, SIZE, HIDDEN = 2, 32, 96


@pytest.fixture
def weight() -> torch.Tensor:
    """Two heads whose singular values fall off, the second steeply and to nothing."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(HEADS, n, SIZE, generator=generator))[0] for n in (HIDDEN, SIZE))
    s = torch.stack((torch.logspace(0, -1, SIZE), torch.cat((torch.logspace(0, -4, SIZE - 2), torch.zeros(2)))))
    return ((u * s.unsqueeze(1)) @ v.mT).mT.flatten(0, 1)


def effective(basis) -> torch.Tensor:
    return (basis.down.double() @ basis.up.double()).mT.flatten(0, 1)


FORMATS = {
    "4 bits": (StreamFormat(HEADS, SIZE, 4, SIZE, 1), [(slice(1, SIZE), 1.0)]),
    "groups": (StreamFormat(HEADS, SIZE, 2, 16, 2), [(slice(2, 16), 1.0), (slice(16, SIZE), 1.0)]),
    "runs": (AllocatedFormat(SIZE, (((8, 4), (4, 8), (2, 12)),) * HEADS), [(slice(4, 24), None)]),
}


@pytest.mark.parametrize(("stream", "rounded"), FORMATS.values(), ids=FORMATS)
def test_same_function_in_integers(weight: torch.Tensor, stream: Stream, rounded) -> None:
    basis = factorize(weight, HEADS, "head", outlier_channels=1, rotate=True, seed=0, dtype=torch.float32)
    integer = with_integer_up(basis, stream)
    assert integer.down.dtype == basis.down.dtype
    for rows, step in rounded:
        steps = torch.tensor([step] * SIZE if step else [STEP[8]] * 4 + [STEP[4]] * 8 + [STEP[2]] * 20)[rows]
        weighted = integer.up[:, rows].double() * steps.unsqueeze(-1)
        units = weighted / (weighted.abs().amax(1, keepdim=True) / 127)
        assert (units - units.round()).abs().max() < 1e-3
        assert not torch.equal(integer.up[:, rows], basis.up[:, rows])
    untouched = torch.ones(SIZE, dtype=torch.bool)
    for rows, _ in rounded:
        untouched[rows] = False
    assert torch.equal(integer.up[:, untouched], basis.up[:, untouched])
    lost = (effective(integer) - weight.double()).norm() / weight.norm()
    assert lost < 2e-3
    # What rounding alone would have cost, and how large channels became.
    alone = (basis.down.double() @ integer.up.double()).mT.flatten(0, 1)
    assert lost < 0.4 * (alone - weight.double()).norm() / weight.norm()
    assert (integer.down.norm(dim=1) < 1.5 * basis.down.norm(dim=1) + 0.05 * basis.down.norm(dim=1).max()).all()


def test_joint_basis(weight: torch.Tensor) -> None:
    basis = factorize(weight, HEADS, "joint", outlier_channels=1, rotate=True, seed=0, dtype=torch.float32)
    width = HEADS * SIZE
    integer = with_integer_up(basis, StreamFormat(1, width, 4, width, 1))
    units = integer.up[:, 1:].double()
    units = units / (units.abs().amax(1, keepdim=True) / 127)
    assert (units - units.round()).abs().max() < 1e-3
    rebuilt = torch.cat([(integer.down[0].double() @ up.double()).T for up in integer.up])
    assert (rebuilt - weight.double()).norm() / weight.norm() < 2e-3


@pytest.mark.parametrize("bits", [8, 16])
def test_leaves_codes_of_more_bits(weight: torch.Tensor, bits: int) -> None:
    basis = factorize(weight, HEADS, "head", outlier_channels=1, rotate=True, seed=0, dtype=torch.float32)
    assert with_integer_up(basis, StreamFormat(HEADS, SIZE, bits, SIZE, 0)) is basis
