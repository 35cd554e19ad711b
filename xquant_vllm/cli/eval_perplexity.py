"""``xquant eval perplexity``: from options to a result."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch

from xquant_vllm.cli.eval_output import check_outputs, refuse_infinite, report, text_of
from xquant_vllm.cli.eval_subject import Subject
from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.model.logits import Rows
from xquant_vllm.evaluation.tasks.kept_scores import Score
from xquant_vllm.evaluation.tasks.perplexity import evaluate_windows
from xquant_vllm.evaluation.tasks.positions import PositionScores, position_lines, position_table, score_positions
from xquant_vllm.evaluation.tasks.result import perplexity_result, summary
from xquant_vllm.evaluation.tasks.scores import WindowScore, score_window, total
from xquant_vllm.evaluation.tasks.windows import cut_windows
from xquant_vllm.offline.progress import counted_bar


def evaluate_perplexity(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: what :mod:`xquant_vllm.cli.eval_arguments` parsed.

    Raises:
        RefusedError: the model, the text or an option cannot be used.
        SettingsError: a setting of the server cannot work.
        UnsupportedError: the server would refuse the method for this model.
        OSError: a result cannot be written.
    """
    _check(options)
    check_outputs(options)
    with Subject(options) as subject:
        text, name = text_of(options)
        subject.check_length("--window", options.window)
        stride = options.window if options.stride is None else options.stride
        windows = cut_windows(subject.tokenizer(), text, name, options.window, options.windows, stride)
        subject.prepare(options.window)
        if options.position_buckets is None:
            scores = _scores(options, subject, windows, "perplexity", WindowScore, score_window, lambda score: [score])
            table = None
        else:
            count = options.position_buckets
            by_position = partial(score_positions, buckets=count)
            task = f"perplexity-{count}"
            found = _scores(options, subject, windows, task, PositionScores, by_position, lambda score: score.buckets)
            scores = [total(score.buckets) for score in found]
            table = position_table(found, options.window)
        about = {"text": name, "window": options.window, "windows": options.windows, "stride": stride, **subject.about}
        result = perplexity_result(subject.method, subject.bytes_16bit, scores, about)
    lines = [summary(result)]
    if table is not None:
        result["positions"] = table
        lines += position_lines(table)
    report(result, "\n".join(lines), options)


def _scores(
    options: argparse.Namespace,
    subject: Subject,
    windows: torch.Tensor,
    task: str,
    kind: type[Score],
    score_one: Callable[[torch.Tensor, Rows, Rows], Score],
    parts_of: Callable[[Score], Sequence[WindowScore]],
) -> list[Score]:
    """Scores of all windows, those that are kept and those that are not."""
    kept = subject.kept_scores(task, kind)
    missing = [window for window in windows if kept is None or kept.load(window) is None]
    scores = []
    with subject.engine(missing) as engine:
        found = evaluate_windows(windows, engine.reference, subject.candidate(engine), score_one, kept)
        for score in counted_bar(found, len(windows), options.method, "window"):
            for part in parts_of(score):
                refuse_infinite(part.kl + part.nll + part.nll_16bit)
            scores.append(score)
    return scores


def _check(options: argparse.Namespace) -> None:
    count = options.position_buckets
    if count is not None and not 1 <= count < options.window:
        raise RefusedError(
            f"xquant: --position-buckets {count} cannot work; set 1 or more, and fewer than --window {options.window} "
            "has tokens"
        )
