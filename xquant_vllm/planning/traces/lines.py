"""Lines of JSON with the numbers by which an error names them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xquant_vllm.errors import RefusedError, cause_of


class Line:
    """One line of a trace.

    Attributes:
        value: what it holds.
    """

    def __init__(self, path: Path, number: int, value: Any) -> None:
        """Of a file."""
        self._path, self._number, self.value = path, number, value

    def refuse(self, problem: str, instead: str) -> RefusedError:
        """The error for it: a verb first, and what to do."""
        return RefusedError(f"xquant: --trace {self._path}: line {self._number} {problem}; {instead}")

    def whole_number(self, name: str, least: int = 0) -> int:
        """A field.

        Raises:
            RefusedError: it is missing, or no whole number, or too small.
        """
        value = self.value.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(f"has {name!r}: {value!r}", f"set a whole number of at least {least}")
        return value


def read_lines(path: Path) -> Iterator[Line]:
    """Lines that are not empty.

    Raises:
        RefusedError: the file cannot be read, or a line is no JSON.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise RefusedError(
                        f"xquant: --trace {path}: line {number} is no JSON ({cause_of(error)}); write one object a line"
                    ) from None
                yield Line(path, number, value)
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(
            f"xquant: --trace {path} cannot be read ({cause_of(error)}); name a file of JSON lines"
        ) from None
