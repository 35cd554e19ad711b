"""Arguments of ``xquant eval``."""

import argparse
import json
from pathlib import Path
from typing import Any

# Not from the evaluation room, whose imports take seconds: --help must not wait for torch.
METHODS = ("16bit", "kivi", "kivi-pre-rope", "paper-xquant", "paper-xquant-cl", "turboquant", "xquant", "xquant-cl")
DATASETS = ("wikitext-2", "c4", "gsm8k", "longbench")


def add_eval(commands: Any) -> None:
    """Add the command and what it can evaluate."""
    evaluate = commands.add_parser(
        "eval",
        help="measure what a quantized cache costs: perplexity",
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
    perplexity.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or its name on the hub")
    _add_text(perplexity)
    add_method(perplexity)
    perplexity.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default %(default)s"
    )
    perplexity.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default %(default)s")
    perplexity.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    perplexity.add_argument("--out", metavar="FILE.json", type=Path, help="write the result there, too")
    perplexity.add_argument(
        "--resume",
        metavar="DIR",
        type=Path,
        help="keep every window's score in DIR, and take those that are there: an interrupted run goes on",
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--text",
        metavar="FILE",
        help="plain text in UTF-8 (default: python-docs, the half of Python's documentation that is not calibrated on)",
    )
    text.add_argument("--dataset", choices=DATASETS, help="fetch a dataset from the Hugging Face hub")
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens per window (default %(default)s)")
    parser.add_argument("--windows", type=int, default=3, metavar="N", help="how many windows (default %(default)s)")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from one window's start to the next's (default: the window)"
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
    from xquant_vllm.cli.eval import evaluate_perplexity

    evaluate_perplexity(options)


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a table of settings such as {{"outlier_channels": 0}}')
    return settings
