"""What single instructions do in the emulation, against matrix products."""

import ctypes

import pytest
import torch

LANE = torch.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


# Of the result, in any type: rows and columns of a lane's four numbers.
RESULT = torch.stack((GROUP, GROUP, GROUP + 8, GROUP + 8), 1), torch.stack((2 * MEMBER, 2 * MEMBER + 1) * 2, 1)


def fragments(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``matrix[rows, columns]``, two 16-bit numbers or four bytes a register: ``[32, registers]`` int32."""
    return matrix[rows, columns].contiguous().view(torch.int32).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("subnormal", [False, True])
def test_product(library, dtype: torch.dtype, subnormal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    if subnormal:
        a = torch.randint(0, 256, (16, 16), generator=generator).to(torch.int16).view(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    pair = torch.arange(2)
    two = 2 * MEMBER[:, None, None] + pair
    rows = torch.stack((GROUP, GROUP + 8, GROUP, GROUP + 8), 1)[..., None].expand(-1, -1, 2)
    columns = torch.cat((two, two, two + 8, two + 8), 1)
    of_a = fragments(a, rows, columns)
    of_b = fragments(b.T.contiguous(), GROUP[:, None, None].expand(-1, 2, 2), torch.cat((two, two + 8), 1))
    of_c = c[RESULT].contiguous()
    _run(library, of_a, of_b, of_c, dtype, transposed=False)
    expected = (a.double() @ b.double() + c.double()).float()
    assert torch.equal(of_c, expected[RESULT])


def test_byte_product(library) -> None:
    """Unsigned bytes times signed ones, the extremes of both among them."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(0, 256, (16, 32), generator=generator).to(torch.uint8)
    b = torch.randint(-128, 128, (32, 8), generator=generator).to(torch.int8)
    a[0], b[:, 0], b[:, 1] = 255, 127, -128
    c = torch.randint(-(2**30), 2**30, (16, 8), generator=generator).int()
    four = 4 * MEMBER[:, None, None] + torch.arange(4)
    rows = torch.stack((GROUP, GROUP + 8, GROUP, GROUP + 8), 1)[..., None].expand(-1, -1, 4)
    of_a = fragments(a, rows, torch.cat((four, four, four + 16, four + 16), 1))
    of_b = fragments(b.T.contiguous(), GROUP[:, None, None].expand(-1, 2, 4), torch.cat((four, four + 16), 1))
    of_c = c[RESULT].contiguous()
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (of_a, of_b, of_c)]
    assert library.xquant_emulation_byte_product(*pointers) == 0
    assert torch.equal(of_c, (a.int() @ b.int() + c)[RESULT])


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(library, transposed: bool) -> None:
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    loaded = _run(
        library,
        torch.zeros(32, 4).int(),
        torch.zeros(32, 2).int(),
        torch.zeros(32, 4),
        torch.float16,
        transposed,
        matrices,
    )
    expected = matrices.transpose(1, 2) if transposed else matrices
    two = 2 * MEMBER[:, None] + torch.arange(2)
    for index in range(4):
        registers = loaded[:, index : index + 1].contiguous().view(torch.int16)
        assert torch.equal(registers, expected[index][GROUP[:, None], two])


def _run(library, a, b, c, dtype, transposed, matrices=None) -> torch.Tensor:
    matrices = torch.zeros(32, 8, dtype=torch.int16) if matrices is None else matrices
    loaded = torch.empty(32, 4, dtype=torch.int32)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a.contiguous(), b.contiguous(), c, matrices, loaded)]
    assert library.xquant_emulation_products(*pointers, int(dtype == torch.bfloat16), int(transposed)) == 0
    return loaded
