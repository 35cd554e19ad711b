"""``xquant``: its commands, and how errors are told."""

import argparse
import sys
from collections.abc import Sequence

from xquant_vllm import __version__
from xquant_vllm.cli.eval_arguments import add_eval
from xquant_vllm.cli.factorize_arguments import add_factorize
from xquant_vllm.cli.help_format import examples
from xquant_vllm.cli.inspection.arguments import add_cache, add_doctor, add_inspect
from xquant_vllm.cli.option_words import in_option_words
from xquant_vllm.cli.plan_arguments import add_plan
from xquant_vllm.cli.serve_arguments import add_serve
from xquant_vllm.cli.setup_cpu import add_setup_cpu
from xquant_vllm.errors import XQuantError

_REFUSED, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what the user can mend is one line on standard error.

    Args:
        arguments: as typed, None for the process's own.

    Returns:
        The exit status: 0, 1 where a command has found what it looks for and that is bad, 2 for a refusal or a failure,
        130 after Ctrl-C.
    """
    options = _parsed(arguments)
    try:
        status: int | None = options.command(options)
    except XQuantError as error:
        print(in_option_words(error, options), file=sys.stderr)
        return _REFUSED
    except OSError as error:
        print(f"xquant: {error}; {_left_behind(options)}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt:
        print(f"xquant: interrupted; {_left_behind(options)}", file=sys.stderr)
        return _INTERRUPTED
    return status or 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; ``rest`` of a command that passes on what it does not know."""
    whole = parser()
    options, rest = whole.parse_known_args(arguments)
    if not getattr(options, "passes_on", False):
        return whole.parse_args(arguments)
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if typed[1] != options.model:
        # An option's value may have been taken for it.
        whole.error(f"name the model first: xquant {typed[0]} MODEL [options]")
    options.rest = rest
    return options


def parser() -> argparse.ArgumentParser:
    """What parses the arguments of all commands."""
    xquant = argparse.ArgumentParser(
        prog="xquant",
        description="Tools for the vLLM attention backend xquant.",
        **examples(
            "xquant eval perplexity models/smollm2-135m-instruct --bits 3",
            "xquant factorize MODEL --out DIR --calibration my_text.txt --bits 3",
            "xquant doctor",
            "xquant serve MODEL --bits 2",
        ),
    )
    xquant.add_argument("--version", action="version", version=__version__)
    commands = xquant.add_subparsers(required=True, metavar="COMMAND")
    add_factorize(commands)
    add_eval(commands)
    add_plan(commands)
    add_inspect(commands)
    add_cache(commands)
    add_doctor(commands)
    add_setup_cpu(commands)
    add_serve(commands)
    return xquant


def _left_behind(options: argparse.Namespace) -> str:
    """What there is of a result that did not come about."""
    if getattr(options, "resume", None) is not None:
        return f"scores so far are in {options.resume}, and the same command goes on after them"
    out = getattr(options, "out", None)
    return f"nothing was written{f' to {out}' if out else ''}"
