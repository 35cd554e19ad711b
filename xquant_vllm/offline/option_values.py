"""Checks of numbers that options of a command give, in the words of the command line.

The settings of a server say the same of JSON; see :mod:`xquant_vllm.scheme.settings`.
"""

from collections.abc import Sequence

from xquant_vllm.codec.layout import UNIFORM_BITS
from xquant_vllm.codec.packing import UNQUANTIZED_BITS
from xquant_vllm.errors import RefusedError

PerStreamValue = int | dict[str, int]


def bits_value(option: str, given: int | Sequence[int]) -> PerStreamValue:
    """Bits as a setting takes them.

    Args:
        option: what gives them, for the error.
        given: one number, or one for keys and one for values.

    Raises:
        RefusedError: no page format has such bits.
    """
    value = per_stream_value(option, given)
    for bits in numbers_of(given):
        if bits not in UNIFORM_BITS:
            quantized = [str(choice) for choice in UNIFORM_BITS if choice != UNQUANTIZED_BITS]
            raise RefusedError(
                f"xquant: {option} {spaced(given)} cannot work: no page format has {bits}-bit codes; set "
                f"{', '.join(quantized[:-1])} or {quantized[-1]} ({UNQUANTIZED_BITS} for no quantization), or two of "
                f"them, the first for keys and the second for values, such as {option} 4 2"
            )
    return value


def per_stream_value(option: str, given: int | Sequence[int]) -> PerStreamValue:
    """One number, or two as a setting takes them.

    Raises:
        RefusedError: they are neither one nor two.
    """
    numbers = numbers_of(given)
    if not 1 <= len(numbers) <= 2:
        raise RefusedError(
            f"xquant: {option} takes one number, or one for keys and one for values, not {spaced(given) or 'none'}"
        )
    return numbers[0] if len(numbers) == 1 else {"key": numbers[0], "value": numbers[1]}


def at_least(option: str, value: int | float | None, least: int, hint: str = "") -> None:
    """Refuse a number that is too small.

    Args:
        option: what gives it.
        value: the number; None where it is not given.
        least: the smallest that works.
        hint: what the error says further, after a semicolon or in brackets.

    Raises:
        RefusedError: it is smaller.
    """
    if value is not None and value < least:
        raise RefusedError(f"xquant: {option} {value} cannot work; set {least} or more{hint}")


def numbers_of(given: int | Sequence[int]) -> tuple[int, ...]:
    """One number or several as a tuple."""
    return (given,) if isinstance(given, int) else tuple(given)


def spaced(given: int | Sequence[int]) -> str:
    """Numbers as they are typed."""
    return " ".join(map(str, numbers_of(given)))
