"""Texts of the usual benchmarks, through the ``datasets`` library and the Hugging Face hub."""

from collections.abc import Callable
from typing import Any

from xquant_vllm.errors import RefusedError

# Documents of C4 that are joined; its validation shards are far longer than anybody evaluates on.
_C4_DOCUMENTS = 1000


def _wikitext(datasets: Any) -> str:
    rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    return "\n\n".join(rows["text"])


def _c4(datasets: Any) -> str:
    shard = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    rows = datasets.load_dataset("allenai/c4", data_files=shard, split="validation")
    return "\n\n".join(rows[:_C4_DOCUMENTS]["text"])


def _gsm8k(datasets: Any) -> str:
    rows = datasets.load_dataset("openai/gsm8k", "main", split="test")
    return "\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows)


def _longbench(datasets: Any) -> str:
    # The authors' own repository needs a loading script, which the library no longer runs. These are the same files.
    rows = datasets.load_dataset("Xnhyacinth/LongBench", "gov_report", split="test")
    return "\n\n".join(rows["context"])


_TEXTS: dict[str, Callable[[Any], str]] = {
    "wikitext-2": _wikitext,
    "c4": _c4,
    "gsm8k": _gsm8k,
    "longbench": _longbench,
}
DATASETS = tuple(_TEXTS)


def dataset_text(name: str) -> str:
    """A dataset as one text, documents separated by blank lines.

    Args:
        name: one of ``DATASETS``.

    Raises:
        RefusedError: the library is not installed, or the dataset cannot be fetched.
    """
    try:
        import datasets
    except ImportError:
        raise RefusedError(
            f"xquant: --dataset {name} needs the datasets library: pip install datasets, or give a file with --text"
        ) from None
    try:
        return _TEXTS[name](datasets)
    except Exception as error:  # the hub has many errors of its own, and all mean the same here
        raise RefusedError(
            f"xquant: --dataset {name} cannot be fetched ({type(error).__name__}: {error}); give a file with --text"
        ) from None
