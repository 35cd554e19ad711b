"""Arguments of ``vllm serve``: the user's, with the settings of the cache merged into them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from xquant_vllm.errors import RefusedError
from xquant_vllm.scheme.settings import CONFIG_KEY

_ADDITIONAL, _BACKEND = "--additional-config", "--attention-backend"
_XQUANT = "xquant"


def vllm_arguments(given: Mapping[str, Any], rest: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What ``vllm serve MODEL`` is to be called with.

    Args:
        given: settings of the cache, by options of this command.
        rest: the user's arguments for vLLM, which keep their order.

    Returns:
        All settings of the cache, and the arguments.

    Raises:
        RefusedError: the user's arguments contradict the settings, or cannot be read.
    """
    kept, found = _without(rest, (_ADDITIONAL, _BACKEND))
    for backend in found[_BACKEND]:
        if backend.lower() != _XQUANT:
            raise RefusedError(
                f"xquant: {_BACKEND} {backend} cannot work with xquant serve, which serves the backend {_XQUANT}; "
                "leave it out, or use vllm serve"
            )
    if any(argument.startswith(f"{_ADDITIONAL}.") for argument in map(_dashed, kept)):
        raise RefusedError(
            f"xquant: {_ADDITIONAL} by parts cannot be merged with the settings of xquant serve; give it as JSON, such "
            f'as {_ADDITIONAL} \'{{"{CONFIG_KEY}": {{"rotate": false}}}}\''
        )
    additional: dict[str, Any] = {}
    for text in found[_ADDITIONAL]:
        additional = _table(text)
    settings = additional.get(CONFIG_KEY) or {}
    if not isinstance(settings, dict):
        raise RefusedError(f"xquant: {_ADDITIONAL} has {CONFIG_KEY!r}: {settings!r}, which is not a table of settings")
    for name, value in given.items():
        if name in settings and settings[name] != value:
            raise RefusedError(
                f"xquant: --{name} says {_plain(value)}, but {_ADDITIONAL} has {name!r}: {_plain(settings[name])}; "
                "leave one of them out"
            )
    settings = {**settings, **given}
    if settings:
        additional[CONFIG_KEY] = settings
    more = [_ADDITIONAL, json.dumps(additional)] if additional else []
    return settings, [_BACKEND, _XQUANT, *more, *kept]


def _without(arguments: Sequence[str], options: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Arguments without some options, and the values of these."""
    kept: list[str] = []
    found: dict[str, list[str]] = {option: [] for option in options}
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        name = _dashed(name)
        if name not in found:
            kept.append(argument)
            continue
        if not equals:
            try:
                value = next(waiting)
            except StopIteration:
                raise RefusedError(f"xquant: {name} has no value; give one, or leave it out") from None
        found[name].append(value)
    return kept, found


def _dashed(argument: str) -> str:
    """An option's name as vLLM knows it, which takes underscores for dashes."""
    return argument.replace("_", "-") if argument.startswith("--") else argument


def _table(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise RefusedError(f"xquant: {_ADDITIONAL} {text!r} is not JSON ({error}); give a table") from None
    if not isinstance(content, dict):
        raise RefusedError(f'xquant: {_ADDITIONAL} {text!r} is not a table; give one such as {{"{CONFIG_KEY}": {{}}}}')
    return content


def _plain(value: Any) -> str:
    return json.dumps(value)


def number_of(arguments: Sequence[str], options: Sequence[str]) -> int | None:
    """The whole number that an option is given, under any of its names; None if it is not there, or no number."""
    values = [value for found in _without(arguments, options)[1].values() for value in found]
    return int(values[-1]) if values and values[-1].isdigit() else None
