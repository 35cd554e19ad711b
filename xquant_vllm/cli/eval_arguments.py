"""Arguments of ``xquant eval``."""

import argparse
import json
from pathlib import Path
from typing import Any

# What imports torch, which takes seconds, is imported when a command runs: not for --help.
from xquant_vllm.evaluation.methods.method_options import DATASETS, METHODS


def add_eval(commands: Any) -> None:
    """Add the command and what it can evaluate."""
    evaluate = commands.add_parser(
        "eval",
        help="measure what a quantized cache costs: perplexity, needles in a haystack",
        description="Measure what a quantized cache costs in quality. No server is needed.",
    )
    tasks = evaluate.add_subparsers(required=True, metavar="TASK", dest="task")
    perplexity = tasks.add_parser(
        "perplexity",
        help="perplexity of a text, teacher-forced, every attended token read back from the quantized cache",
        description="Perplexity of a text with a quantized cache and with a 16-bit one, their divergence, and the "
        "bytes that a token takes.",
    )
    perplexity.set_defaults(command=run_perplexity)
    _add_model_and_text(perplexity)
    perplexity.add_argument(
        "--window", type=int, default=1024, metavar="N", help="tokens per window (default %(default)s)"
    )
    perplexity.add_argument(
        "--windows", type=int, default=3, metavar="N", help="how many windows (default %(default)s)"
    )
    perplexity.add_argument(
        "--stride", type=int, metavar="N", help="tokens from one window's start to the next's (default: the window)"
    )
    add_method(perplexity)
    _add_run(perplexity)

    needle = tasks.add_parser(
        "needle",
        help="find a number that stands at some depth of a long text",
        description="Hide a number in a text, ask for it at the end, and see whether greedy decoding finds it with a "
        "quantized cache and with a 16-bit one, and how likely it is.",
    )
    needle.set_defaults(command=run_needle)
    _add_model_and_text(needle)
    needle.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[256, 512, 1024],
        metavar="N",
        help="tokens of prompt and answer (default 256 512 1024)",
    )
    needle.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="D",
        help="where the number stands: 0 at the start, 1 at the end (default 0 0.25 0.5 0.75 1)",
    )
    needle.add_argument(
        "--trials", type=int, default=3, metavar="N", help="prompts for each length and depth (default %(default)s)"
    )
    add_method(needle)
    _add_run(needle)


def _add_model_and_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or its name on the hub")
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--text",
        metavar="FILE",
        help="plain text in UTF-8 (default: python-docs, the half of Python's documentation that is not calibrated on)",
    )
    text.add_argument("--dataset", choices=DATASETS, help="fetch a dataset from the Hugging Face hub")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--through",
        choices=["offline", "vllm"],
        default="offline",
        help="offline: the transformers model with its cache replaced (default); vllm: vLLM itself and its pages, for "
        "16bit, xquant and xquant-cl",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default %(default)s"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="write the result there, too")
    parser.add_argument(
        "--resume",
        metavar="DIR",
        type=Path,
        help="keep every score in DIR, and take those that are there: an interrupted run goes on",
    )


def add_method(parser: argparse.ArgumentParser) -> None:
    """Add what to cache, and how."""
    parser.add_argument("--method", choices=METHODS, default="xquant", help="what is cached (default %(default)s)")
    parser.add_argument(
        "--bits",
        nargs="+",
        type=int,
        metavar="BITS",
        help="bits per cached number; xquant also takes one for keys and one for values (default 4)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="numbers that share a scale and a zero point (default: kivi 32, kivi-pre-rope 128, xquant as served)",
    )
    parser.add_argument(
        "--residual",
        type=int,
        metavar="N",
        help="with kivi, recent tokens kept in 16 bit; as published 128 (default 0: all are quantized)",
    )
    parser.add_argument("--basis", choices=["head", "joint"], help="with xquant (default head)")
    parser.add_argument(
        "--settings", type=_settings, metavar="JSON", help="with xquant and xquant-cl, any settings of the server"
    )
    parser.add_argument(
        "--calibration",
        metavar="TEXT_FILE",
        help="with xquant and xquant-cl, text to fit the factors to; python-docs for the other half of Python's "
        "documentation (default), none for factors from the weights alone",
    )
    parser.add_argument("--calibration-tokens", type=int, metavar="N", help="tokens of it to read (default 2048)")


def run_perplexity(options: argparse.Namespace) -> None:
    """Run the command; torch takes seconds to import."""
    from xquant_vllm.cli.eval_perplexity import evaluate_perplexity

    evaluate_perplexity(options)


def run_needle(options: argparse.Namespace) -> None:
    """Run the command; torch takes seconds to import."""
    from xquant_vllm.cli.eval_needle import evaluate_needle

    evaluate_needle(options)


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a table of settings such as {{"outlier_channels": 0}}')
    return settings
