"""Fixtures of the end-to-end tests."""

from collections.abc import Iterator

import pytest

from tests.e2e.engine import Engines

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
def prompts(tokenizer) -> list[list[int]]:
    """Twenty varied prompts, chats and plain texts, as token ids."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in _QUESTIONS
    ]
    return chats + [tokenizer.encode(text) for text in _TEXTS]
