"""Arguments of ``xquant doctor``, ``xquant inspect`` and ``xquant cache``."""

import argparse
import re
from pathlib import Path
from typing import Any

from xquant_vllm.cli.help_format import examples

# What imports torch, which takes seconds, is imported when a command runs: not for --help.

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def add_doctor(commands: Any) -> None:
    """Add ``xquant doctor``."""
    parser = commands.add_parser(
        "doctor",
        help="say whether this machine can serve, by which kernels, and what is wrong",
        description="Look at versions, the plugin, kernels, compilers, caches and variables, and try a tiny attention. "
        "Exit status 0: a server can be started; 1: it cannot, and what to do is said.",
        **examples("xquant doctor", "xquant doctor --json"),
    )
    parser.set_defaults(command=_run_doctor)
    parser.add_argument("--json", action="store_true", help="print one JSON object, for a bug report")


def add_inspect(commands: Any) -> None:
    """Add ``xquant inspect``."""
    parser = commands.add_parser(
        "inspect",
        help="say what a folder of factors holds: of which model, how, in how many bits, and whether it is whole",
        description="Say what a folder that xquant factorize has written holds, and check it. Exit status 0: it is "
        "whole; 1: a checksum does not match.",
        **examples("xquant inspect DIR", "xquant inspect DIR --plot bits.png"),
    )
    parser.set_defaults(command=_run_inspect)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder, or one of its two files of factors")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="draw the bits of all layers' channels there (needs matplotlib)"
    )


def add_cache(commands: Any) -> None:
    """Add ``xquant cache`` and what it does."""
    parser = commands.add_parser(
        "cache",
        help="list or clear the cache of factors that servers have computed",
        description="List or clear the cache of factors that servers have computed at start-up.",
        **examples("xquant cache list", "xquant cache clear --older-than 30d --dry-run"),
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    listed = actions.add_parser(
        "list",
        help="models, settings, sizes, and when they were used last",
        description="List what is in the cache, by model and settings.",
        **examples("xquant cache list", "xquant cache list --json"),
    )
    listed.set_defaults(command=_run_cache_list)
    listed.add_argument("--json", action="store_true", help="print one JSON object")
    cleared = actions.add_parser(
        "clear",
        help="remove entries; servers that run are not disturbed",
        description="Remove entries of the cache, all of them if nothing else is said, and no other files. Servers "
        "that run are not disturbed; the next start of a model computes its factors again.",
        **examples("xquant cache clear --dry-run", "xquant cache clear --model smollm2-135m-instruct --older-than 30d"),
    )
    cleared.set_defaults(command=_run_cache_clear)
    which = cleared.add_argument_group("which")
    which.add_argument(
        "--older-than",
        metavar="TIME",
        type=seconds,
        help="only what was not used for so long: a number and s, m, h, d or w, such as 30d",
    )
    which.add_argument("--model", metavar="NAME", help="only of a model: its name as xquant cache list shows it")
    cleared.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")


def seconds(text: str) -> int:
    """A span of time, such as ``30d``.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d{1,9})([smhdw])", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: set a number and s, m, h, d or w, such as 30d")
    return int(match[1]) * _SECONDS[match[2]]


def _run_doctor(options: argparse.Namespace) -> int:
    from xquant_vllm.cli.inspection.doctor import run

    return run(options)


def _run_inspect(options: argparse.Namespace) -> int:
    from xquant_vllm.cli.inspection.inspect import run

    return run(options)


def _run_cache_list(options: argparse.Namespace) -> None:
    from xquant_vllm.cli.inspection.cache import list_cache

    list_cache(options)


def _run_cache_clear(options: argparse.Namespace) -> None:
    from xquant_vllm.cli.inspection.cache import clear_cache

    clear_cache(options)
