"""Arguments of ``xquant factorize``."""

import argparse
from pathlib import Path
from typing import Any

from xquant_vllm.cli.help_format import examples

# What imports torch, which takes seconds, is imported when the command runs: not for --help.


def add_factorize(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "factorize",
        help="factorize a checkpoint's key and value projections, once",
        description="Write a copy of a checkpoint with its key and value projections factorized, calibrated on a text "
        "if one is given. Serve it with: vllm serve DIR --attention-backend xquant",
        **examples(
            "xquant factorize models/smollm2-135m-instruct --out factorized",
            "xquant factorize MODEL --out DIR --calibration my_text.txt --bits 3",
            "xquant factorize MODEL --out DIR --method xquant-cl --calibration my_text.txt --bits 2",
            "xquant factorize MODEL --out DIR --calibration my_text.txt --max-kl 0.02",
        ),
    )
    parser.set_defaults(command=_run)
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or its name on the Hugging Face hub")
    _add_output(parser.add_argument_group("output"))
    _add_calibration(parser.add_argument_group("calibration"))
    _add_method(parser.add_argument_group("method"))
    _add_certificate(parser.add_argument_group("measured loss"))
    parser.add_argument_group("where to compute").add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="default cpu"
    )


def _add_output(group: Any) -> None:
    group.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write, not there yet")
    group.add_argument("--force", action="store_true", help="replace DIR if it was written by this command")
    group.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="dtype to serve in (default auto, which is what vLLM takes)",
    )


def _add_calibration(group: Any) -> None:
    group.add_argument(
        "--calibration",
        metavar="TEXT_FILE",
        help="plain text like what will be served; mixed-text for that of this package, python-docs for half of "
        "the text that ships with Python (default: none, bases from the weights alone)",
    )
    group.add_argument(
        "--calibration-tokens",
        metavar="N",
        type=int,
        help="tokens of it to read (default 8192, on a CPU fewer of models with more than a billion weights; only with "
        "a text)",
    )


def _add_method(group: Any) -> None:
    group.add_argument(
        "--method",
        choices=["xquant", "xquant-cl"],
        help="xquant: bases of every layer by itself (default); xquant-cl: a chain that predicts layers from those "
        "before; needs --calibration",
    )
    group.add_argument(
        "--bits",
        nargs="+",
        type=int,
        metavar="BITS",
        help="bits to serve the folder with if none are set: one number, or one for keys and one for values. With "
        "--calibration one number, the mean over all channels, is built in (default 4)",
    )
    group.add_argument(
        "--basis",
        choices=["head", "joint"],
        help="head: one basis per kv head (default); joint: one for all of them. With --calibration a joint latent is "
        "of keys and values together, the default where the layer input is narrower than these (multi-head attention). "
        "Not with xquant-cl",
    )
    group.add_argument(
        "--outlier-channels",
        nargs="+",
        type=int,
        metavar="N",
        help="channels kept in FP16: of keys, or of keys and of values (default 1; not with --calibration)",
    )
    group.add_argument(
        "--rotate",
        action=argparse.BooleanOptionalAction,
        help="rotate the other channels (default; not with --calibration)",
    )
    group.add_argument(
        "--anchor-interval",
        type=int,
        metavar="N",
        help="only with xquant-cl: layers from one that is stored by itself to the next; 0: only the first is. "
        "Longer chains take fewer bytes and are slower to read (default 4)",
    )
    group.add_argument(
        "--first-layers",
        type=int,
        metavar="N",
        help="only with xquant-cl: layers at the start that are stored by themselves (default 1)",
    )


def _add_certificate(group: Any) -> None:
    group.add_argument(
        "--max-kl",
        metavar="NATS",
        type=float,
        help="write the cache of fewest bytes whose divergence from 16 bit, measured on other text, is known to be no "
        "more than that (the upper end of its 95%% interval); searches bits, and the method unless one is set",
    )
    group.add_argument(
        "--certificate-text",
        metavar="TEXT_FILE",
        help="plain text to measure on (default: what --calibration has left of its file, or else half of the text "
        "that ships with Python)",
    )
    group.add_argument(
        "--no-certificate",
        dest="certificate",
        action="store_false",
        help="do not measure what the cache loses; it takes about as long as calibration",
    )


def _run(options: argparse.Namespace) -> None:
    from xquant_vllm.cli.factorize import run

    run(options)
