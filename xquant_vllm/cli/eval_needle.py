"""``xquant eval needle``: from options to a result."""

import argparse

from xquant_vllm.cli.eval_output import check_outputs, refuse_infinite, report, text_of
from xquant_vllm.cli.eval_subject import Subject
from xquant_vllm.evaluation.tasks.needle import NeedleScore, evaluate_needles
from xquant_vllm.evaluation.tasks.needle_prompts import needle_prompts
from xquant_vllm.evaluation.tasks.needle_result import needle_result, needle_summary
from xquant_vllm.offline.progress import counted_bar


def evaluate_needle(options: argparse.Namespace) -> None:
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
        subject.check_length("--lengths", max(options.lengths))
        prompts = list(needle_prompts(subject.tokenizer(), text, name, options.lengths, options.depths, options.trials))
        subject.prepare(max(options.lengths))
        kept = subject.kept_scores("needle", NeedleScore)
        missing = [prompt.window for prompt in prompts if kept is None or kept.load(prompt.tokens) is None]
        scores = []
        with subject.engine(missing, "prompt") as engine:
            found = evaluate_needles(prompts, engine.reference, subject.candidate(engine), kept)
            for score in counted_bar(found, len(prompts), options.method, "prompt"):
                refuse_infinite(score.nll + score.nll_16bit)
                scores.append(score)
        about = {"text": name, "trials": options.trials, **subject.about}
        result = needle_result(subject.method, subject.bytes_16bit, prompts, scores, about)
    report(result, needle_summary(result), options)
