"""Texts: files, and the documentation that ships with CPython, half of it to calibrate on and half to evaluate on."""

from pathlib import Path
from typing import Any

from xquant_vllm.errors import RefusedError
from xquant_vllm.scheme.factor_header import PYTHON_DOCS


def text_name(source: str) -> str:
    """What results and headers call a text: no path of this machine."""
    return source if source == PYTHON_DOCS else Path(source).name


def calibration_text(source: str) -> str:
    """The text of ``--calibration``: a file, or the calibration half of the documentation.

    Raises:
        RefusedError: the file cannot be read.
    """
    return python_docs_to_calibrate() if source == PYTHON_DOCS else read_file("--calibration", source)


def read_file(option: str, path: str) -> str:
    """A file as text.

    Args:
        option: what names it, for the error.
        path: where it is.

    Raises:
        RefusedError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(
            f"xquant: {option} {path} cannot be read as UTF-8 text ({error}); give a text file, or {PYTHON_DOCS}"
        ) from None


def python_docs_to_evaluate() -> str:
    """Every other topic of the language reference, by name, starting with the second."""
    return "\n\n".join(_topics()[1::2])


def python_docs_to_calibrate() -> str:
    """The other topics, without the paragraphs that also stand in one to evaluate on: some topics contain others."""
    evaluated = {_words(paragraph) for paragraph in python_docs_to_evaluate().split("\n\n")}
    paragraphs = "\n\n".join(_topics()[0::2]).split("\n\n")
    return "\n\n".join(paragraph for paragraph in paragraphs if _words(paragraph) not in evaluated)


def opening_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: its BOS token, or nothing."""
    return [tokenizer.bos_token_id] if tokenizer.encode("a")[0] == tokenizer.bos_token_id else []


def _topics() -> list[str]:
    import pydoc_data.topics

    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def _words(paragraph: str) -> str:
    """A paragraph however it is indented."""
    return " ".join(paragraph.split())
