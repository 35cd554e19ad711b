"""``--additional-config``: entries that the backends which serve do not read."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xquant_vllm.plugin.unread.names import KEYS, Lost, is_setting, keys_inside, meant, named

_OPTION = "--additional-config"


def lost_settings(additional: Mapping[Any, Any], read: Sequence[str], instead: str) -> Iterator[Lost]:
    """What is meant for a backend of this package, and is not read by one.

    Args:
        additional: the table, as the user gave it.
        read: keys of the backends that serve; empty where none does.
        instead: what serves where none does, for the message.
    """
    misplaced: dict[str, Any] = {}
    for word, value in additional.items():
        if word in read:
            continue
        key = word if word in KEYS else meant(word, value)
        tables = {word: value} if key else keys_inside(value)
        key = key or next((named(inner) for inner in tables), None)
        if not read:
            for name in tables:
                yield Lost(
                    f"{name!r} in {_OPTION} has no effect, since {instead}; add --attention-backend {key}, or leave "
                    "the settings out",
                    certain=False,
                )
        elif key is None:
            of = next((name for name in (*read, *KEYS) if is_setting(name, word, value)), None)
            if of in read:
                misplaced[word] = {word: value}
            elif of is not None:
                yield Lost(
                    f"{word!r} in {_OPTION} has no effect with --attention-backend {read[0]}: it is a setting of {of}; "
                    "leave it out",
                    certain=False,
                )
        elif key in read:
            misplaced[word] = next(iter(tables.values()))
        else:
            yield Lost(
                f"{word!r} in {_OPTION} has no effect with --attention-backend {read[0]}; set --attention-backend "
                f"{key}, or give settings under {read[0]!r}",
                # One table may be there for both backends.
                certain=not any(name in additional for name in read),
            )
    if misplaced:
        yield _misplaced(additional, misplaced, read[0])


def _misplaced(additional: Mapping[Any, Any], misplaced: Mapping[str, Any], key: str) -> Lost:
    """The error for settings that stand elsewhere than under their key, with the option that has them there."""
    together: dict[str, Any] = {}
    for settings in (*misplaced.values(), additional.get(key)):
        together |= _table(settings)
    words = ", ".join(map(repr, misplaced))
    right = json.dumps({key: together}, default=str)
    return Lost(
        f"{words} in {_OPTION} {'is' if len(misplaced) == 1 else 'are'} not read: all settings of the backend {key} "
        f"stand in one table under {key!r}; set {_OPTION} '{right}'",
        certain=True,
    )


def _table(settings: Any) -> dict[str, Any]:
    """A table of settings, also from a string with one."""
    if isinstance(settings, str):
        try:
            settings = json.loads(settings)
        except ValueError:
            return {}
    return dict(settings) if isinstance(settings, Mapping) else {}
