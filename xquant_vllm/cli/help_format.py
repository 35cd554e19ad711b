"""How --help ends: with examples."""

import argparse
from typing import Any


def examples(*commands: str) -> dict[str, Any]:
    """Arguments of a parser whose --help ends with commands, each on a line of its own.

    Args:
        commands: what to type.
    """
    title = "example:" if len(commands) == 1 else "examples:"
    return {
        "formatter_class": _Formatter,
        "epilog": "\n".join((title, *(f"  {command}" for command in commands))),
    }


class _Formatter(argparse.HelpFormatter):
    """Wraps everything but what ends with lines of its own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)
