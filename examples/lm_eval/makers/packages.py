"""Packages whose data become questions."""

from __future__ import annotations

import importlib
from typing import Any

# What `pip` calls a package, its licence, and what is taken from it.
SOURCES = {
    "countryinfo": ("MIT", "countries, their capitals and provinces"),
    "periodictable": ("public domain", "chemical elements and their symbols"),
}


class MissingPackageError(Exception):
    """A package is not installed; the message says how to get all of them."""


def load(name: str) -> Any:
    """A package of :data:`SOURCES`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(
            f"the questions are made from {name} ({SOURCES[name][1]}), which is not installed; "
            f"run: pip install {' '.join(SOURCES)}"
        ) from None
