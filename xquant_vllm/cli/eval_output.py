"""What the tasks of ``xquant eval`` share before and after: the text, and the result."""

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.files import replace_json
from xquant_vllm.evaluation.tasks.datasets import dataset_text
from xquant_vllm.offline.texts import PYTHON_DOCS, python_docs_to_evaluate, read_file, text_name


def text_of(options: argparse.Namespace) -> tuple[str, str]:
    """The text and its name.

    Raises:
        RefusedError: it cannot be read.
    """
    if options.dataset is not None:
        return dataset_text(options.dataset), options.dataset
    if options.text is None or options.text == PYTHON_DOCS:
        return python_docs_to_evaluate(), PYTHON_DOCS
    return read_file("--text", options.text), text_name(options.text)


def refuse_infinite(score: float) -> None:
    """Refuse a model that yields no numbers."""
    if not math.isfinite(score):
        raise RefusedError(
            "xquant: the model yields numbers that are not finite; set --dtype float32, and if it is set, look at the "
            "checkpoint"
        )


def report(result: Mapping[str, Any], summary: str, options: argparse.Namespace) -> None:
    """Write and print a result.

    Args:
        result: as JSON.
        summary: to read.
        options: of the command.
    """
    if options.out is not None:
        replace_json(options.out, result)
    print(json.dumps(result) if options.json else summary)
