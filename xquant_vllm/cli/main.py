"""``xquant``: arguments and errors."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from xquant_vllm import __version__
from xquant_vllm.cli.eval_arguments import add_eval


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what the user can mend is one line on standard error.

    Args:
        arguments: as typed, None for the process's own.

    Returns:
        The exit status: 0, or 2 for a refusal.
    """
    options = _parser().parse_args(arguments)
    # torch takes seconds to import: not for --help.
    from xquant_vllm.errors import RefusedError, SettingsError, UnsupportedError

    try:
        options.command(options)
    except (RefusedError, SettingsError, UnsupportedError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"xquant: {error}; nothing was written{f' to {options.out}' if options.out else ''}", file=sys.stderr)
        return 2
    return 0


def _factorize(options: argparse.Namespace) -> None:
    from xquant_vllm.cli.factorize import factorize_checkpoint

    factorize_checkpoint(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xquant", description="Tools for the vLLM attention backend xquant.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    factorize = commands.add_parser(
        "factorize",
        help="factorize a checkpoint's key and value projections, once",
        description="Write a copy of a checkpoint with its key and value projections factorized, calibrated on a text "
        "if one is given. Serve it with: vllm serve DIR --attention-backend xquant",
    )
    factorize.set_defaults(command=_factorize)
    factorize.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or its name on the Hugging Face hub")
    factorize.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write, not there yet")
    factorize.add_argument(
        "--calibration",
        metavar="TEXT_FILE",
        help="plain text like what will be served, or python-docs for half of the text that ships with "
        "Python (default: none, bases from the weights alone)",
    )
    factorize.add_argument(
        "--calibration-tokens", metavar="N", type=int, default=2048, help="tokens of it to read (default %(default)s)"
    )
    factorize.add_argument(
        "--bits",
        nargs="+",
        type=int,
        metavar="BITS",
        help="bits to serve the folder with if none are set: one number, or one for keys and one for values. With "
        "--calibration one number, the mean over all channels, is built in (default 4)",
    )
    factorize.add_argument(
        "--method",
        choices=["xquant", "xquant-cl"],
        default="xquant",
        help="xquant: bases of every layer by itself (default); xquant-cl: a chain that predicts layers from those "
        "before; needs --calibration",
    )
    factorize.add_argument(
        "--anchor-interval",
        type=int,
        metavar="N",
        help="with --method xquant-cl, layers from one that is stored by itself to the next; 0: only the first is. "
        "Longer chains take fewer bytes and are slower to read (default: the server's for chains of latents, 4)",
    )
    factorize.add_argument(
        "--first-layers",
        type=int,
        metavar="N",
        help="with --method xquant-cl, layers at the start that are stored by themselves (default: likewise, 1)",
    )
    factorize.add_argument(
        "--basis",
        choices=["head", "joint"],
        help="one basis per kv head (default), or joint: one for all of them; with --calibration a joint latent is of "
        "keys and values together, the default where the layer input is narrower than these (multi-head attention)",
    )
    factorize.add_argument(
        "--outlier-channels",
        nargs="+",
        type=int,
        metavar="N",
        help="channels kept in FP16: of keys, or of keys and values (default 1; not with --calibration)",
    )
    factorize.add_argument(
        "--rotate",
        action=argparse.BooleanOptionalAction,
        help="rotate the other channels (default; not with --calibration)",
    )
    factorize.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="dtype to serve in (default auto, which is what vLLM takes)",
    )
    factorize.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute (default cpu)")
    factorize.add_argument("--force", action="store_true", help="replace DIR if it was written by this command")
    add_eval(commands)
    return parser
