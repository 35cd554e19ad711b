"""What the tasks of ``xquant eval`` share before and after: the text, and the result."""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.files import replace_json
from xquant_vllm.evaluation.tasks.datasets import dataset_text
from xquant_vllm.offline.texts import python_docs_to_evaluate, read_file
from xquant_vllm.offline.writable import check_file, check_folder
from xquant_vllm.scheme.calibration.texts import PYTHON_DOCS, text_name


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


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse places that cannot be written to, before anything is computed.

    Raises:
        RefusedError: it names ``--out`` or ``--resume``, why, and what to name instead.
    """
    check_file("--out", options.out)
    check_folder("--resume", options.resume)


def report(result: Mapping[str, Any], summary: str, options: argparse.Namespace) -> None:
    """Print a result and write it, in this order: what cannot be written is not lost.

    Args:
        result: as JSON.
        summary: to read.
        options: of the command.

    Raises:
        RefusedError: it cannot be written, or cannot be printed; the other is done in any case.
    """
    printed = None
    try:
        print(json.dumps(result) if options.json else summary, flush=True)
    except OSError as error:  # a full disk, or a pipe whose reader is gone
        printed = error
        # What is left in the buffer would fail again at the end.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if options.out is not None:
        try:
            replace_json(options.out, result)
        except OSError as error:
            raise RefusedError(
                f"xquant: --out {options.out} cannot be written ({error}); the result stands on standard output"
            ) from None
    if printed is not None:
        where = "name a file with --out" if options.out is None else f"it is in {options.out}"
        raise RefusedError(f"xquant: the result cannot be printed ({printed}); {where}")
