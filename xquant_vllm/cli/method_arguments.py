"""Arguments of ``xquant eval`` that say what is cached, and how."""

import argparse
import json
from typing import Any

from xquant_vllm.evaluation.methods.method_names import METHODS


def add_method(group: Any) -> None:
    """Add them to a group of arguments."""
    group.add_argument("--method", choices=METHODS, default="xquant", help="what is cached (default %(default)s)")
    group.add_argument(
        "--bits",
        nargs="+",
        type=int,
        metavar="BITS",
        help="bits per cached number; xquant also takes one for keys and one for values (default 4)",
    )
    group.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="with kivi, kivi-pre-rope, xquant and xquant-cl: numbers that share a scale and a zero point (default: "
        "kivi 32, kivi-pre-rope 128, xquant as served)",
    )
    group.add_argument(
        "--residual",
        type=int,
        metavar="N",
        help="with kivi: recent tokens kept in 16 bit; as published 128 (default 0: all are quantized)",
    )
    group.add_argument(
        "--basis",
        choices=["head", "joint"],
        help="with xquant: one basis per kv head, or one for all (default head, or as xquant factorize has it)",
    )
    group.add_argument(
        "--settings", type=_settings, metavar="JSON", help="with xquant and xquant-cl: any settings of the server"
    )
    group.add_argument(
        "--calibration",
        metavar="TEXT_FILE",
        help="with xquant and xquant-cl: text to fit the factors to; python-docs for the other half of Python's "
        "documentation (default), mixed-text for what a server takes by itself, none for the weights alone",
    )
    group.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help="tokens of it to read, 64 or more (default 8192, on a CPU fewer of models with more than a billion "
        "weights)",
    )


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a table of settings such as {{"outlier_channels": 0}}')
    return settings
