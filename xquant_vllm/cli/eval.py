"""``xquant eval``: from options to a result."""

import argparse
import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xquant_vllm.evaluation.cache_method import CacheMethod
from xquant_vllm.evaluation.datasets import dataset_text
from xquant_vllm.evaluation.files import replace_json
from xquant_vllm.evaluation.hooked_model import HookedModel
from xquant_vllm.evaluation.kept_scores import KeptScores, model_fingerprint
from xquant_vllm.evaluation.method_options import MethodOptions
from xquant_vllm.evaluation.methods import bytes_16bit, prepare_method
from xquant_vllm.evaluation.perplexity import evaluate_windows
from xquant_vllm.evaluation.result import perplexity_result, summary, versions
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
    method = prepare_method(options.method, _method_options(options), checkpoint, dtype, options.window)

    @functools.cache
    def model() -> HookedModel:
        return HookedModel(checkpoint, dtype, torch.device(options.device))

    @functools.cache
    def candidate() -> CacheMethod:
        return method.build(model())

    kept = None
    if options.resume is not None:
        about = {"model": model_fingerprint(checkpoint), "dtype": options.dtype, "device": options.device}
        described = {"name": method.name, "bits": method.bits, "settings": method.settings}
        kept = KeptScores(options.resume, about | {"versions": versions()}, described)
    scores = []
    exact = CacheMethod()
    for score in tqdm(
        evaluate_windows(
            windows,
            lambda tokens: model().logits(tokens, exact),
            None if method.name == "16bit" else lambda tokens: model().logits(tokens, candidate()),
            kept,
        ),
        desc=method.name,
        total=len(windows),
        unit="window",
    ):
        if not math.isfinite(score.kl + score.nll + score.nll_16bit):
            raise RefusedError(
                f"xquant: --dtype {options.dtype}: the model yields numbers that are not finite; set --dtype float32"
            )
        scores.append(score)
    about = {
        "model": options.model if not Path(options.model).is_dir() else Path(options.model).resolve().name,
        "text": name,
        "window": options.window,
        "windows": options.windows,
        "stride": options.stride or options.window,
        "dtype": options.dtype,
        "device": options.device,
    }
    result = perplexity_result(method, bytes_16bit(checkpoint), scores, about)
    report(result, options)


def report(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write and print a result."""
    if options.out is not None:
        replace_json(options.out, result)
    print(json.dumps(result) if options.json else summary(result))


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
