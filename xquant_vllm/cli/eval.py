"""``xquant eval``: from options to a result."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xquant_vllm.evaluation.datasets import dataset_text
from xquant_vllm.evaluation.files import replace_json
from xquant_vllm.evaluation.kept_scores import KeptScores, model_fingerprint
from xquant_vllm.evaluation.method_options import MethodOptions
from xquant_vllm.evaluation.methods import bytes_16bit, prepare_method
from xquant_vllm.evaluation.offline_engine import OfflineEngine
from xquant_vllm.evaluation.perplexity import evaluate_windows
from xquant_vllm.evaluation.prepared_method import PreparedMethod
from xquant_vllm.evaluation.result import perplexity_result, summary, versions
from xquant_vllm.evaluation.scores import WindowScore
from xquant_vllm.evaluation.windows import cut_windows
from xquant_vllm.offline.checkpoint import Checkpoint, open_checkpoint
from xquant_vllm.offline.refused import RefusedError
from xquant_vllm.offline.texts import PYTHON_DOCS, python_docs_to_evaluate, read_file, text_name
from xquant_vllm.projection.factor_file import DTYPES


def evaluate_perplexity(options: argparse.Namespace) -> None:
    """Run ``xquant eval perplexity``.

    Args:
        options: what :mod:`xquant_vllm.cli.eval_arguments` parsed.

    Raises:
        RefusedError: the model, the text or an option cannot be used.
        SettingsError: a setting of the server cannot work.
        UnsupportedError: the server would refuse the method for this model.
        OSError: a result cannot be written.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RefusedError("xquant: --device cuda: PyTorch sees no GPU; leave the option out to compute on the CPU")
    checkpoint, dtype = open_checkpoint(options.model), DTYPES[options.dtype]
    text, name = _text(options)
    windows = _windows(options, checkpoint, text, name)
    device = torch.device(options.device)
    method = prepare_method(options.method, _method_options(options), checkpoint, dtype, options.window, device)

    engine = OfflineEngine(checkpoint, method, dtype, device)
    candidate = None if method.name == "16bit" else engine.candidate
    kept = _kept_scores(options, checkpoint, method)
    scores = scores_with_progress(evaluate_windows(windows, engine.reference, candidate, kept), method, len(windows))
    about = {
        "model": options.model if not Path(options.model).is_dir() else Path(options.model).resolve().name,
        "text": name,
        "window": options.window,
        "windows": options.windows,
        "stride": options.window if options.stride is None else options.stride,
        "dtype": options.dtype,
        "device": options.device,
    }
    result = perplexity_result(method, bytes_16bit(checkpoint), scores, about)
    report(result, options)


def scores_with_progress(scores: Iterator[WindowScore], method: PreparedMethod, windows: int) -> list[WindowScore]:
    """Collect scores behind a bar.

    Raises:
        RefusedError: the model yields no numbers.
    """
    collected = []
    with tqdm(desc=method.name, total=windows, unit="window") as bar:
        for score in scores:
            bar.update()
            if not math.isfinite(score.kl + score.nll + score.nll_16bit):
                raise RefusedError(
                    "xquant: the model yields numbers that are not finite; set --dtype float32, and if it is set, look "
                    "at the checkpoint"
                )
            collected.append(score)
    return collected


def report(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write and print a result."""
    if options.out is not None:
        replace_json(options.out, result)
    print(json.dumps(result) if options.json else summary(result))


def _kept_scores(options: argparse.Namespace, checkpoint: Checkpoint, method: PreparedMethod) -> KeptScores | None:
    """Of ``--resume``."""
    if options.resume is None:
        return None
    model = {"model": model_fingerprint(checkpoint), "dtype": options.dtype, "device": options.device}
    described = {"name": method.name, "bits": method.bits, "settings": method.settings}
    return KeptScores(options.resume, model | {"versions": versions()}, described)


def _text(options: argparse.Namespace) -> tuple[str, str]:
    """The text and its name."""
    if options.dataset is not None:
        return dataset_text(options.dataset), options.dataset
    if options.text is None or options.text == PYTHON_DOCS:
        return python_docs_to_evaluate(), PYTHON_DOCS
    return read_file("--text", options.text), text_name(options.text)


def _windows(options: argparse.Namespace, checkpoint: Checkpoint, text: str, name: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    text_config = checkpoint.config.get("text_config") or checkpoint.config
    longest = text_config.get("max_position_embeddings")
    if longest is not None and options.window > longest:
        raise RefusedError(
            f"xquant: --window {options.window} is longer than the {longest} positions of this model; set {longest} "
            "or less"
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    stride = options.window if options.stride is None else options.stride
    return cut_windows(tokenizer, text, name, options.window, options.windows, stride)


def _method_options(options: argparse.Namespace) -> MethodOptions:
    return MethodOptions(
        bits=None if options.bits is None else tuple(options.bits),
        group_size=options.group_size,
        residual=options.residual,
        basis=options.basis,
        settings=options.settings,
        calibration=options.calibration,
        calibration_tokens=options.calibration_tokens,
    )
