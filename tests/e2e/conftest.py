"""Fixtures of the end-to-end tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.engine import Engines
from tests.tiny_models import save_tiny_model

_QUESTIONS = [
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Explain photosynthesis to a child.",
    "How do I sort a list in Python?",
    "Name three colours.",
    "Why is the sky blue?",
    "Who wrote Hamlet?",
    "What should I cook tonight?",
]
_TEXTS = [
    "The quick brown fox",
    "In 1969, humans first",
    "def fibonacci(n):",
    "Once upon a time in a small village",
    "The derivative of x squared is",
    "SELECT name FROM users WHERE",
    "Dear Sir or Madam,",
    "Water boils at",
    "The history of Rome begins",
    "To be, or not to be,",
    "The planet Jupiter",
    "import numpy as np\n",
]


@pytest.fixture(scope="session")
def engines(tmp_path_factory) -> Iterator[Engines]:
    """Engines whose answers are shared by the whole session."""
    engines = Engines(tmp_path_factory.mktemp("engines"))
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    """The tiny checkpoint of a family, written once; who changes it takes a copy."""
    folders: dict[str, Path] = {}

    def tiny(family: str) -> Path:
        if family not in folders:
            folders[family] = save_tiny_model(tmp_path_factory.mktemp(family) / "model", family)
        return folders[family]

    return tiny


@pytest.fixture(scope="session")
def prompts(tokenizer) -> list[list[int]]:
    """Twenty varied prompts, chats and plain texts, as token ids."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in _QUESTIONS
    ]
    return chats + [tokenizer.encode(text) for text in _TEXTS]
