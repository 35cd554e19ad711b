"""Numbers that say which output row of which linear layer they are, exact in every dtype of a model.

The numbers of the first tokens are digits of the row's number, so that it can be read off. The others are random, and
tell that nothing was done to them on the way: signs and sizes from ``2^-6`` to ``2^15`` show any scale, sum, clamp or
activation. All have 8 significant bits at most, which is what bfloat16 has. Every row has both signs.
"""

from collections.abc import Mapping

import torch

TOKENS = 13  # an uncommon size, so that this dimension is found in a tensor of any layout
_DIGITS = 3
_BASE = 255


class RowCodes:
    """Codes of the output rows of several linear layers, which share one numbering."""

    def __init__(self, rows: Mapping[str, int], seed: int) -> None:
        """Number the rows.

        Args:
            rows: how many output rows every layer has, by its path.
            seed: of the random numbers: another one for each rank, so that nobody takes another's rows for his own.

        Raises:
            ValueError: there are more rows than can be numbered, 16 million.
        """
        self._first: dict[str, int] = {}
        total = 0
        for path, number in rows.items():
            self._first[path] = total
            total += number
        if total > _BASE**_DIGITS:
            raise ValueError(f"{total} rows cannot be numbered")
        self._rows = dict(rows)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        sizes = torch.randint(1, _BASE + 1, (TOKENS, total), generator=generator, device="cpu")
        numbers = torch.arange(total, device="cpu")
        for digit in range(_DIGITS):
            sizes[digit] = numbers // _BASE**digit % _BASE + 1
        signs = torch.randint(0, 2, sizes.shape, generator=generator, device="cpu") * 2 - 1
        signs[1] = -signs[0]
        self._table = (sizes * signs).float() * _UNITS

    def of(self, path: str) -> torch.Tensor:
        """Codes of a layer's rows ``[TOKENS, rows]``, FP32 on the CPU."""
        first = self._first[path]
        return self._table[:, first : first + self._rows[path]]

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers of the rows that channels are.

        Args:
            tensor: ``[TOKENS, channels]``, any floating dtype.

        Returns:
            ``[channels]``, int64 on the CPU; -1 for a channel that is no row, or not it alone.
        """
        table = self._table
        codes = tensor.detach().to("cpu", torch.float32)
        digits = (codes[:_DIGITS] / _UNITS[:_DIGITS]).abs().nan_to_num(0, 0, 0).round().clamp(1, _BASE).long() - 1
        numbers = sum(digits[digit] * _BASE**digit for digit in range(_DIGITS))
        assert isinstance(numbers, torch.Tensor)
        numbers = numbers.clamp(max=table.shape[1] - 1)
        same = (table[:, numbers] == codes).all(0)
        return torch.where(same, numbers, torch.full_like(numbers, -1))

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
