"""Datasets: what is asked of the library (its stand-in here: there is no network), and what is refused without it."""

import sys
from types import SimpleNamespace

import pytest

from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.tasks.datasets import DATASETS, dataset_text

ROWS = {
    "wikitext-2": {"text": ["one", "two"]},
    "c4": {"text": ["one", "two"]},
    "gsm8k": [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}],
    "longbench": {"context": ["one", "two"]},
}


class Sliceable(dict):
    """Rows of the library: a column by its name, rows by a slice."""

    def __getitem__(self, what):
        return self if isinstance(what, slice) else super().__getitem__(what)


@pytest.mark.parametrize("name", DATASETS)
def test_documents_are_joined(monkeypatch, name):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append(arguments)
        assert options["split"] in ("test", "validation")
        return Sliceable(ROWS[name]) if isinstance(ROWS[name], dict) else ROWS[name]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    gsm8k = "Question: 1 + 1?\nAnswer: 2\n\nQuestion: 2 + 2?\nAnswer: 4"
    assert dataset_text(name) == (gsm8k if name == "gsm8k" else "one\n\ntwo")
    assert len(asked) == 1


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RefusedError, match=r"--dataset c4 needs the datasets library: pip install datasets.*--text"):
        dataset_text("c4")


def test_a_dataset_that_cannot_be_fetched_is_refused(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(RefusedError, match=r"--dataset c4 cannot be fetched \(ConnectionError: no route.*--text"):
        dataset_text("c4")
