"""From pydantic's errors to one clear error for users, whichever backend the settings are for."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from xquant_vllm.errors import SettingsError

_OWN = "xquant"  # type of the errors that say themselves what to do


def refuse(why: str, instead: str) -> PydanticCustomError:
    """The error for validators to raise: why a value cannot work, and what to set instead."""
    return PydanticCustomError(_OWN, "{why}; {instead}", {"why": why, "instead": instead})


def explained(
    error: ValidationError, raw: Mapping[str, Any], key: str, known: Iterable[str], advice: Mapping[str, str]
) -> SettingsError:
    """The error for users, with one line per setting that cannot work.

    Args:
        error: pydantic's.
        raw: the settings as given.
        key: what they are given under in ``additional_config``, which starts every line.
        known: names of all settings.
        advice: what to set, by setting, where pydantic itself finds the value wrong.
    """
    return SettingsError("\n".join(_explain(problem, raw, key, list(known), advice) for problem in error.errors()))


def _explain(problem: Any, raw: Mapping[str, Any], key: str, known: list[str], advice: Mapping[str, str]) -> str:
    """One line for one of pydantic's errors."""
    names = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = known if len(names) == 1 else ["key", "value"]
        close = difflib.get_close_matches(names[-1], known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        where = f"{key}: " if len(names) == 1 else f"{key}: setting {names[0]!r}: "
        return f"{where}unknown setting {names[-1]!r}; {hint}known are {', '.join(known)}"
    if not names:
        return f"{key}: {problem['msg']}"
    value: Any = raw.get(names[0])
    why = problem["msg"] if problem["type"] == _OWN else f"{problem['msg']}; {advice[names[0]]}"
    return f"{key}: setting {'.'.join(names)!r}: {value!r} cannot work: {why}"
