"""``xquant eval perplexity``: from options to a result."""

import argparse

from xquant_vllm.cli.eval_output import check_outputs, refuse_infinite, report, text_of
from xquant_vllm.cli.eval_subject import Subject
from xquant_vllm.evaluation.tasks.perplexity import evaluate_windows
from xquant_vllm.evaluation.tasks.result import perplexity_result, summary
from xquant_vllm.evaluation.tasks.scores import WindowScore
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
    check_outputs(options)
    with Subject(options) as subject:
        text, name = text_of(options)
        subject.check_length("--window", options.window)
        stride = options.window if options.stride is None else options.stride
        windows = cut_windows(subject.tokenizer(), text, name, options.window, options.windows, stride)
        subject.prepare(options.window)
        kept = subject.kept_scores("perplexity", WindowScore)
        missing = [window for window in windows if kept is None or kept.load(window) is None]
        scores = []
        with subject.engine(missing) as engine:
            found = evaluate_windows(windows, engine.reference, subject.candidate(engine), kept)
            for score in counted_bar(found, len(windows), options.method, "window"):
                refuse_infinite(score.kl + score.nll + score.nll_16bit)
                scores.append(score)
        about = {"text": name, "window": options.window, "windows": options.windows, "stride": stride, **subject.about}
        result = perplexity_result(subject.method, subject.bytes_16bit, scores, about)
    report(result, summary(result), options)
