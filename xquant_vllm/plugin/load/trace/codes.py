"""Numbers that say which output row of which linear layer they are, exact in every dtype of a model.

For the first token all rows have the code 1, which tells a common factor. The next ones are digits of the row's number,
so that it can be read off. The others are random, and tell that nothing was done to them on the way: signs and sizes
from ``2^-5`` to ``2^15`` show any sum, clamp or activation. All have 8 significant bits at most, as bfloat16 has.
"""

from collections.abc import Mapping

import torch

TOKENS = 13  # an uncommon size, so that this dimension is found in a tensor of any layout
_DIGITS = 4
_BASE = 32  # digits are codes of 32 to 63: far enough from each other for a rounded product
_RANDOM = 1 + _DIGITS
# Relative difference of a code times a factor from what two roundings to bfloat16 leave.
_ROUNDED = 2.0**-7


class RowCodes:
    """Codes of the output rows of several linear layers, which share one numbering."""

    def __init__(self, rows: Mapping[str, int], seed: int) -> None:
        """Number the rows.

        Args:
            rows: how many output rows every layer has, by its path.
            seed: of the random numbers: another one for each rank, so that nobody takes another's rows for his own.

        Raises:
            ValueError: there are more rows than can be numbered, a million.
        """
        self._rows = dict(rows)
        self._first: dict[str, int] = {}
        total = 0
        for path, number in rows.items():
            self._first[path] = total
            total += number
        if total > _BASE**_DIGITS:
            raise ValueError(f"{total} rows cannot be numbered")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        sizes = torch.randint(1, 256, (TOKENS, total), generator=generator, device="cpu")
        numbers = torch.arange(total, device="cpu")
        for digit in range(_DIGITS):
            sizes[1 + digit] = numbers // _BASE**digit % _BASE + _BASE
        signs = torch.randint(0, 2, sizes.shape, generator=generator, device="cpu") * 2 - 1
        signs[2] = -signs[1]  # every row has both signs
        self._table = (sizes * signs).float() * _UNITS
        self._table[0] = 1

    def of(self, path: str) -> torch.Tensor:
        """Codes of a layer's rows ``[TOKENS, rows]``, FP32 on the CPU."""
        first = self._first[path]
        return self._table[:, first : first + self._rows[path]]

    def factor(self, tensor: torch.Tensor) -> float | None:
        """What all channels ``[TOKENS, channels]`` may have been multiplied by; None if no number would do."""
        factors = tensor[0].detach().to("cpu", torch.float32).unique()
        return factors.item() if factors.numel() == 1 and 0 < abs(factors.item()) < float("inf") else None

    def read(self, tensor: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """The numbers of the rows that channels are.

        Args:
            tensor: ``[TOKENS, channels]``, any floating dtype.
            factor: what they were all multiplied by.

        Returns:
            ``[channels]``, int64 on the CPU; -1 for a channel that is no row, or not it alone.
        """
        codes = tensor.detach().to("cpu", torch.float32) / factor
        digits = (codes / _UNITS)[1:_RANDOM].abs().nan_to_num(0, 0, 0).round().long().clamp(_BASE, 2 * _BASE - 1)
        places = _BASE ** torch.arange(_DIGITS, device="cpu").unsqueeze(1)
        numbers = ((digits - _BASE) * places).sum(0).clamp(max=self._table.shape[1] - 1)
        expected = self._table[:, numbers]
        allowed = 0.0 if factor == 1.0 else _ROUNDED * expected.abs()
        return torch.where(((codes - expected).abs() <= allowed).all(0), numbers, -1)

    def numbers(self, path: str, rows: torch.Tensor) -> torch.Tensor:
        """Numbers of a layer's rows."""
        return rows + self._first[path]

    def owners(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """The layers that rows belong to, by path, and the rows' numbers in them, in the order given."""
        owned = {
            path: numbers[(numbers >= first) & (numbers < first + self._rows[path])] - first
            for path, first in self._first.items()
        }
        return {path: rows for path, rows in owned.items() if rows.numel()}


# Of the tokens: the largest code is 255 * 2^7, which float16 still has.
_UNITS = torch.tensor([[2.0 ** (token - 5)] for token in range(TOKENS)], dtype=torch.float32, device="cpu")
