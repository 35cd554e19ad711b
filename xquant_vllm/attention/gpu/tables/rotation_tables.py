"""A Hadamard rotation as two small matrices, so that a kernel rotates a row by two products.

A row of d channels is m blocks of ``a * b``, seen as a matrix X ``[m * a, b]``. Then ``H = H_a kron H_b`` of every
block and the mix of blocks are::

    (M kron H_a kron H_b) x   =   L X R,      L = M kron H_a   [m * a, m * a],      R = H_b   [b, b]
"""

from dataclasses import dataclass

import torch

from xquant_vllm.codec.rotation import HadamardRotation

# Products take nothing smaller.
_SMALLEST = 16


@dataclass(frozen=True)
class RotationTables:
    """The factors, FP32, padded with 0 to powers of two of at least 16.

    Attributes:
        signs: ``[d]``: what the channels are multiplied by before.
        left: ``[padded_rows, padded_rows]``.
        right: ``[padded_columns, padded_columns]``, +1 and -1.
        rows: rows of X.
        columns: columns of X.
    """

    signs: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    rows: int
    columns: int


def _padded(size: int) -> int:
    return max(_SMALLEST, 1 << (size - 1).bit_length())


def _hadamard(size: int) -> torch.Tensor:
    """``[size, size]`` in its natural order."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def _enlarged(matrix: torch.Tensor) -> torch.Tensor:
    padding = _padded(matrix.shape[0]) - matrix.shape[0]
    return torch.nn.functional.pad(matrix, (0, padding, 0, padding))


def rotation_tables(rotation: HadamardRotation, device: torch.device) -> RotationTables:
    """Factor a rotation where the products are cheapest."""
    blocks, block = rotation.mix.shape[0], rotation.block

    def cost(columns: int) -> int:
        left, right = _padded(blocks * (block // columns)), _padded(columns)
        return left * right * (left + right)

    columns = min((1 << k for k in range(block.bit_length())), key=cost)
    left = torch.kron(rotation.mix.float().cpu().contiguous(), _hadamard(block // columns))
    right = _hadamard(columns)
    return RotationTables(
        signs=rotation.signs.float().to(device),
        left=_enlarged(left).to(device),
        right=_enlarged(right).to(device),
        rows=left.shape[0],
        columns=columns,
    )
