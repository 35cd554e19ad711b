"""Texts: files, the one of this package, and CPython's documentation: half to calibrate on, half to evaluate on."""

from pathlib import Path
from typing import Any

from xquant_vllm.errors import RefusedError
from xquant_vllm.scheme.calibration.texts import MIXED_TEXT, PYTHON_DOCS, mixed_text


def calibration_text(source: str) -> str:
    """The text of ``--calibration``: a file, or one that needs none.

    Raises:
        RefusedError: the file cannot be read.
    """
    built_in = {MIXED_TEXT: mixed_text, PYTHON_DOCS: python_docs_to_calibrate}
    return built_in[source]() if source in built_in else read_file("--calibration", source)


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
