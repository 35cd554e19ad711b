"""Fixtures of the command line's tests."""

import pytest

from tests.factorizing import FakeTokenizer
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny model; copy before changing."""
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture
def tokenizer(monkeypatch):
    """One that needs no files."""
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
