"""What names this package, however it is spelled."""

import difflib
import re
from collections.abc import Mapping
from functools import cache
from pkgutil import resolve_name
from typing import Any, NamedTuple

from pydantic import ValidationError

from xquant_vllm.plugin.registration import BACKEND_NAME, BACKENDS

KEYS = tuple(name.lower() for name in BACKENDS)
"""Under which settings are read, one of every backend."""

# Settings whose names are anybody's words: whether they are meant is told by their values.
_COMMON = ("cache", "hot", "method", "prompt", "rotate")
# "xqaunt" is as near as 0.83 to "xquant".
_NEAR = 0.75


class Lost(NamedTuple):
    """Something that has no effect.

    Attributes:
        text: what it is, why, and what to set instead; without the package's name before it.
        certain: whether nothing else can have been meant by it, so that it is an error where a backend of this package
            serves.
    """

    text: str
    certain: bool


def named(word: object) -> str | None:
    """The key that a word stands for, whatever its case, its dashes, and what follows ``xquant``; or None."""
    letters = re.sub("[^a-z]", "", str(word).lower())
    if letters.startswith(BACKEND_NAME.lower()):
        return BACKEND_NAME.lower()
    return letters if letters in KEYS else None


def meant(word: object, value: object) -> str | None:
    """The key that a word stands for, also if it is misspelled and what it stands over are settings; or None."""
    exact = named(word)
    if exact is not None:
        return exact
    near = difflib.get_close_matches(str(word).lower(), KEYS, n=1, cutoff=_NEAR)
    if near and isinstance(value, Mapping) and any(is_setting(near[0], *item) for item in value.items()):
        return near[0]
    return None


def is_setting(key: str, name: object, value: object) -> bool:
    """Whether a name and its value are a setting of a backend, and not likely anybody else's.

    Args:
        key: the backend's, one of ``KEYS``.
        name: the setting.
        value: its value.
    """
    model = _settings(key)
    if name not in model.model_fields:
        return False
    if name not in _COMMON:
        return True
    try:
        model.model_validate({name: value}, strict=True)
    except ValidationError:
        return False
    return True


def keys_inside(value: object, depth: int = 4) -> dict[str, Any]:
    """Tables at any depth of a value that stand under a word which names this package, by that word."""
    found: dict[str, Any] = {}
    if depth and isinstance(value, Mapping):
        for word, inner in value.items():
            if isinstance(word, str) and named(word):
                found[word] = inner
            else:
                found |= keys_inside(inner, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for inner in value:
            found |= keys_inside(inner, depth - 1)
    return found


@cache
def _settings(key: str) -> Any:
    return resolve_name(BACKENDS[key.upper()].settings)
