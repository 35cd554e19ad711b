"""How much memory the pool of hot blocks takes, as users write it."""

import re
from typing import Any

from xquant_vllm.scheme.setting_errors import refuse

ADVICE = 'set bytes such as 2147483648 or "2GiB", a share of the cache\'s memory such as "20%" or 0.2, or 0 for none'

DEFAULT_SHARE = 0.2
"""Of caches of X, of joint latents and of chains on CPUs, if the user says nothing: see docs/design/hot-blocks.md."""

_UNITS = {"": 1, "B": 1, **{f"{letter}iB": 1 << 10 * (i + 1) for i, letter in enumerate("KMGT")}}
_UNITS |= {f"{letter}B": 10 ** (3 * (i + 1)) for i, letter in enumerate("KMGT")}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[KMGT]?i?B|)\s*", re.IGNORECASE)


def parse_share(value: Any) -> int | float | None:
    """Bytes as an int, or a share of the cache's memory as a float below 1; None as it is.

    Raises:
        PydanticCustomError: it is neither.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = _from_text(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refuse("it is no amount of memory", ADVICE)
    if value < 0:
        raise refuse("it is less than nothing", ADVICE)
    if isinstance(value, float) and value >= 1:
        if not value.is_integer():
            raise refuse("a share of the memory is less than 1", ADVICE)
        if value < 1 << 20:
            raise refuse("nothing would be left for the pages", ADVICE)
        return int(value)
    return value if value else 0


def pool_bytes(setting: int | float, total: int) -> int:
    """Bytes of the pool.

    Args:
        setting: see :func:`parse_share`.
        total: bytes for pages and pool together.
    """
    return int(setting * total) if isinstance(setting, float) else setting


def _from_text(text: str) -> int | float:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise refuse("it is no amount of memory", ADVICE)
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if number >= 100:
            raise refuse("nothing would be left for the pages", ADVICE)
        return number / 100
    if not unit and not number.is_integer():
        return number
    factors = {name.lower(): factor for name, factor in _UNITS.items()}
    if unit.lower() not in factors:
        raise refuse("it is no amount of memory", ADVICE)
    return int(number * factors[unit.lower()])
