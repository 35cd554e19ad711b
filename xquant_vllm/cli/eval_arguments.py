"""Arguments of ``xquant eval``: its tasks, and what they share."""

import argparse
from pathlib import Path
from typing import Any

from xquant_vllm.cli.help_format import examples
from xquant_vllm.cli.method_arguments import add_method

# What imports torch, which takes seconds, is imported when a command runs: not for --help.
from xquant_vllm.evaluation.tasks.datasets import DATASETS


def add_eval(commands: Any) -> None:
    """Add the command and what it can evaluate."""
    evaluate = commands.add_parser(
        "eval",
        help="measure what a quantized cache costs: perplexity, needles in a haystack",
        description="Measure what a quantized cache costs in quality. No server is needed.",
        **examples(
            "xquant eval perplexity models/smollm2-135m-instruct --bits 3",
            "xquant eval needle models/smollm2-135m-instruct --bits 2",
        ),
    )
    tasks = evaluate.add_subparsers(required=True, metavar="TASK", dest="task")
    _add_perplexity(tasks)
    _add_needle(tasks)


def _add_perplexity(tasks: Any) -> None:
    parser = tasks.add_parser(
        "perplexity",
        help="perplexity of a text, teacher-forced, every attended token read back from the quantized cache",
        description="Perplexity of a text with a quantized cache and with a 16-bit one, their divergence, and the "
        "bytes that a token takes.",
        **examples(
            "xquant eval perplexity models/smollm2-135m-instruct --bits 3",
            "xquant eval perplexity MODEL --method kivi --bits 2 --text my_text.txt --windows 8 --out result.json",
        ),
    )
    parser.set_defaults(command=_run_perplexity)
    _add_model(parser)
    evaluated = parser.add_argument_group("what is evaluated")
    _add_text(evaluated)
    evaluated.add_argument(
        "--window", type=int, default=1024, metavar="N", help="tokens per window (default %(default)s)"
    )
    evaluated.add_argument("--windows", type=int, default=3, metavar="N", help="how many windows (default %(default)s)")
    evaluated.add_argument(
        "--stride", type=int, metavar="N", help="tokens from one window's start to the next's (default: the window)"
    )
    evaluated.add_argument(
        "--position-buckets",
        type=int,
        metavar="N",
        help="also say it for N ranges of positions in the window: whether the loss grows with the distance",
    )
    add_method(parser.add_argument_group("method"))
    _add_run(parser.add_argument_group("how it runs"))
    _add_output(parser.add_argument_group("output"))


def _add_needle(tasks: Any) -> None:
    parser = tasks.add_parser(
        "needle",
        help="find a number that stands at some depth of a long text",
        description="Hide a number in a text, ask for it at the end, and see whether greedy decoding finds it with a "
        "quantized cache and with a 16-bit one, and how likely it is.",
        **examples(
            "xquant eval needle models/smollm2-135m-instruct --bits 2 --lengths 512 --trials 1",
            "xquant eval needle MODEL --bits 2 --lengths 1024 4096 --depths 0 0.5 1 --resume scores",
        ),
    )
    parser.set_defaults(command=_run_needle)
    _add_model(parser)
    evaluated = parser.add_argument_group("what is evaluated")
    _add_text(evaluated)
    evaluated.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[256, 512, 1024],
        metavar="N",
        help="tokens of prompt and answer (default 256 512 1024)",
    )
    evaluated.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="D",
        help="where the number stands: 0 at the start, 1 at the end (default 0 0.25 0.5 0.75 1)",
    )
    evaluated.add_argument(
        "--trials", type=int, default=3, metavar="N", help="prompts for each length and depth (default %(default)s)"
    )
    add_method(parser.add_argument_group("method"))
    _add_run(parser.add_argument_group("how it runs"))
    _add_output(parser.add_argument_group("output"))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or its name on the Hugging Face hub")


def _add_text(group: Any) -> None:
    text = group.add_mutually_exclusive_group()
    text.add_argument(
        "--text",
        metavar="FILE",
        help="plain text in UTF-8 (default: python-docs, the half of Python's documentation that is not calibrated on)",
    )
    text.add_argument("--dataset", choices=DATASETS, help="fetch a dataset from the Hugging Face hub")


def _add_run(group: Any) -> None:
    group.add_argument(
        "--through",
        choices=["offline", "vllm"],
        default="offline",
        help="offline: the transformers model with its cache replaced (default); vllm: vLLM itself and its pages, for "
        "16bit, xquant and xquant-cl",
    )
    group.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default %(default)s"
    )
    group.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="default %(default)s; not with --through vllm"
    )


def _add_output(group: Any) -> None:
    group.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    group.add_argument("--out", metavar="FILE.json", type=Path, help="write the result there, too")
    group.add_argument(
        "--resume",
        metavar="DIR",
        type=Path,
        help="keep every score in DIR, and take those that are there: an interrupted run goes on",
    )


def _run_perplexity(options: argparse.Namespace) -> None:
    from xquant_vllm.cli.eval_perplexity import evaluate_perplexity

    evaluate_perplexity(options)


def _run_needle(options: argparse.Namespace) -> None:
    from xquant_vllm.cli.eval_needle import evaluate_needle

    evaluate_needle(options)
