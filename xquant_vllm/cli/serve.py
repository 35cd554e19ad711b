"""``xquant serve``: from options to ``vllm serve``, which takes the place of this process."""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xquant_vllm.cli.serve_config import vllm_arguments
from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.option_values import bits_value
from xquant_vllm.offline.progress import say
from xquant_vllm.scheme.calibration.choice import AUTO, NONE
from xquant_vllm.scheme.settings import XQuantSettings, parse_settings


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
    say(f"step 1 of 3, plan: {_plan(options.model, settings, parsed)}")
    say(f"step 2 of 3, factors: {_factors(parsed)}; a folder that has factors is served as it is")
    command = ["vllm", "serve", options.model, *arguments]
    say(f"step 3 of 3, serve: {shlex.join(command)}")
    sys.stdout.flush()
    os.execv(program[0], [*program, *command[1:]])


def _plan(model: str, settings: Mapping[str, Any], parsed: XQuantSettings) -> str:
    """What will be served, in one line."""
    says = ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items()) or "the default settings"
    return f"{model} with {says} ({parsed.bits} bits, method {parsed.method})"


def _factors(parsed: XQuantSettings) -> str:
    """Where its factors come from; the server makes them, and its log shows how far it is."""
    how = {
        AUTO: "calibrated by the server's first start where that loses less",
        NONE: "computed from the weights alone by the server's first start",
    }.get(parsed.calibration, f"calibrated on {parsed.calibration} by the server's first start")
    return f"{how}, and kept for later ones"


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
