"""``xquant serve``: from options to ``vllm serve``, which takes the place of this process."""

import argparse
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xquant_vllm.cli.serve_config import vllm_arguments
from xquant_vllm.cli.serve_steps import serve_steps
from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.option_values import bits_value
from xquant_vllm.offline.progress import say
from xquant_vllm.scheme.settings import parse_settings


def run(options: argparse.Namespace) -> None:
    """Say what will be done, and become the server: signals reach it, and its exit status is that of the command.

    Args:
        options: what :mod:`xquant_vllm.cli.serve_arguments` parsed; ``rest`` are the arguments that it does not know.

    Raises:
        RefusedError: vLLM is not installed, or an option contradicts another one.
        SettingsError: a setting cannot work.
    """
    given = _settings(options)
    settings, arguments = vllm_arguments(given, options.rest)
    parsed = parse_settings(settings)
    program = _vllm()
    plan, factors = serve_steps(options.model, settings, parsed, options.rest)
    say(f"step 1 of 3, plan: {plan}")
    say(f"step 2 of 3, factors: {factors}")
    command = ["vllm", "serve", options.model, *arguments]
    say(f"step 3 of 3, serve: {shlex.join(command)}")
    sys.stdout.flush()
    os.execv(program[0], [*program, *command[1:]])


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that options give."""
    given: dict[str, Any] = {}
    if options.bits is not None:
        given["bits"] = bits_value("--bits", options.bits)
    for name in ("method", "basis"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    if options.calibration is not None:
        given["calibration"] = options.calibration
    return given


def _vllm() -> Sequence[str]:
    """How vLLM's command is run in the environment of this process.

    Raises:
        RefusedError: it is not there.
    """
    script = Path(sys.executable).with_name("vllm")
    if script.is_file():
        return (str(script),)
    found = shutil.which("vllm")
    if importlib.util.find_spec("vllm") is None or found is None:
        raise RefusedError(
            "xquant: serve needs vLLM, which is not installed in this environment; install it beside xquant-vllm"
        )
    return (found,)
