"""Texts to calibrate on that need no file of the user's, and how any text is told from another.

``mixed.txt`` is of this package, under its licence: prose whose copyright has ended (the King James Bible, Shakespeare,
Cervantes, Smith, Jefferson, Austen, Lincoln, Darwin, Dickens, Poe, Melville, Carroll, Twain, Stevenson, Doyle,
Kipling), and what was written for it: conversations, letters, news, code, data, and a few paragraphs in other
languages.
"""

import hashlib
import platform
from pathlib import Path

# What is called by these names; any other name is a file.
MIXED_TEXT, PYTHON_DOCS = "mixed-text", "python-docs"
BUILT_IN = (MIXED_TEXT, PYTHON_DOCS)

_MIXED = Path(__file__).with_name("mixed.txt")


def mixed_text() -> str:
    """The text that ships with this package."""
    return _MIXED.read_text(encoding="utf-8")


def text_name(source: str) -> str:
    """What results, headers and logs call a text: no path of this machine."""
    return source if source in BUILT_IN else Path(source).name


def text_digest(source: str) -> str:
    """SHA-256 of what a text says, in hexadecimal digits.

    Args:
        source: one of ``BUILT_IN``, or a file.

    Raises:
        OSError: the file cannot be read.
    """
    if source == PYTHON_DOCS:
        # It has the text of the Python that runs.
        return hashlib.sha256(f"{PYTHON_DOCS} {platform.python_version()}".encode()).hexdigest()
    return hashlib.sha256(_MIXED.read_bytes() if source == MIXED_TEXT else Path(source).read_bytes()).hexdigest()
