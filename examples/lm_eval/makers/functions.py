"""Which function of Python's standard library does what its documentation says?

Other versions of Python have other functions. The documentation has the PSF licence.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from .choices import CHOICES, ask

QUESTIONS = 150
TYPES = (bytes, dict, float, frozenset, int, list, set, str)
MODULES = (
    "argparse", "ast", "asyncio", "base64", "binascii", "bisect", "calendar", "cmath", "codecs", "colorsys",
    "contextlib", "copy", "dataclasses", "difflib", "dis", "email.utils", "fileinput", "fnmatch", "functools", "gc",
    "gettext", "glob", "gzip", "heapq", "html", "inspect", "io", "itertools", "json", "keyword", "linecache", "locale",
    "logging", "lzma", "math", "mimetypes", "operator", "os", "os.path", "pickle", "pkgutil", "platform", "plistlib",
    "pprint", "quopri", "random", "re", "secrets", "select", "shlex", "shutil", "signal", "site", "socket", "ssl",
    "statistics", "string", "struct", "subprocess", "sys", "sysconfig", "tempfile", "textwrap", "threading", "time",
    "token", "tokenize", "traceback", "types", "typing", "unicodedata", "urllib.parse", "uuid", "warnings", "weakref",
    "zipfile", "zlib",
)  # fmt: skip
LEAST_WORDS, MOST_WORDS = 4, 20


class Function(NamedTuple):
    """A function and the first sentence of its documentation."""

    home: str
    name: str
    summary: str


def questions(count: int = QUESTIONS) -> Iterator[dict[str, Any]]:
    """Questions about functions, whose choices are of the same module where it has enough."""
    chance = random.Random(3)
    known = functions()
    for function in chance.sample(known, count):
        others = [other.name for other in known if other.home == function.home and other.summary != function.summary]
        if len(set(others)) < CHOICES - 1:
            others = [other.name for other in known if other.summary != function.summary]
        yield ask(f"Which function does this: {function.summary}?", function.name, others, chance)


def functions() -> list[Function]:
    """What is documented in a sentence that does not say the name."""
    found: dict[str, Function] = {}
    for function in (*_of_modules(), *_of_types()):
        words = len(function.summary.split())
        own = function.name.rpartition(".")[2].lower()
        if LEAST_WORDS <= words <= MOST_WORDS and own not in function.summary.lower():
            found.setdefault(function.summary, function)
    return sorted(found.values())


def _of_modules() -> Iterator[Function]:
    for module in MODULES:
        for name, member in sorted(vars(importlib.import_module(module)).items()):
            if not name.startswith("_") and inspect.isroutine(member) and _is_at_home(member, module):
                yield from _function(module, name, member)


def _is_at_home(member: Any, module: str) -> bool:
    """Whether a function is the module's own; those in C have the name of the module with an underscore, or none."""
    home = getattr(member, "__module__", None)
    return home in (None, module, f"_{module}", "posix", "posixpath", "genericpath", module.partition(".")[0])


def _of_types() -> Iterator[Function]:
    for kind in TYPES:
        for name in sorted(vars(kind)):
            if not name.startswith("_"):
                yield from _function(kind.__name__, name, getattr(kind, name))


def _function(home: str, name: str, member: Any) -> Iterator[Function]:
    paragraph = " ".join((inspect.getdoc(member) or "").partition("\n\n")[0].split())
    summary = re.split(r"(?<=[a-z`])\.(?:\s|$)", paragraph)[0].rstrip(".?!: ")
    if summary and "(" not in summary and "->" not in summary:
        yield Function(home, f"{home}.{name}", summary)
