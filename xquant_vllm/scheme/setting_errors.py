"""From pydantic's errors to one clear error for users, whichever backend the settings are for."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from xquant_vllm.errors import SettingsError

Settings = TypeVar("Settings", bound=BaseModel)

_OWN = "xquant"  # type of the errors that say themselves what to do


def refuse(why: str, instead: str) -> PydanticCustomError:
    """The error for validators to raise: why a value cannot work, and what to set instead."""
    return PydanticCustomError(_OWN, "{why}; {instead}", {"why": why, "instead": instead})


def validated(raw: Any, settings: type[Settings], key: str, advice: Mapping[str, str]) -> Settings:
    """Check the user's settings.

    Args:
        raw: what is given under ``key`` in ``additional_config``, or None for the defaults.
        settings: the model to check against.
        key: starts every line of the error.
        advice: what to set, by setting, where pydantic itself finds the value wrong.

    Raises:
        SettingsError: with one line per setting that cannot work.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise SettingsError(
            f"{key}: additional_config['{key}'] = {raw!r} is not a table of settings; "
            f'set for example --additional-config \'{{"{key}": {{"bits": 4}}}}\''
        )
    try:
        return settings.model_validate(raw)
    except ValidationError as error:
        known = list(settings.model_fields)
        lines = [_explain(problem, raw, key, known, advice) for problem in error.errors()]
        raise SettingsError("\n".join(lines)) from None


def _explain(problem: Any, raw: Mapping[str, Any], key: str, known: list[str], advice: Mapping[str, str]) -> str:
    """One line for one of pydantic's errors."""
    names = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        if names[0].lower() == key:
            return f"{key}: settings stand in one table under {key!r}, and not in another {names[0]!r} inside of it"
        known = known if len(names) == 1 else ["key", "value"]
        close = difflib.get_close_matches(names[-1].lower(), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        where = f"{key}: " if len(names) == 1 else f"{key}: setting {names[0]!r}: "
        return f"{where}unknown setting {names[-1]!r}; {hint}known are {', '.join(known)}"
    if not names:
        return f"{key}: {problem['msg']}"
    value: Any = raw.get(names[0])
    why = problem["msg"] if problem["type"] == _OWN else f"{problem['msg']}; {advice[names[0]]}"
    return f"{key}: setting {'.'.join(names)!r}: {value!r} cannot work: {why}"
