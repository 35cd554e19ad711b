"""Errors of a server's settings in the words of the command line, where an option gave the setting."""

import argparse
import re

from xquant_vllm.errors import RefusedError, XQuantError

# Options whose settings have the same name.
_SETTINGS = (
    "method",
    "bits",
    "basis",
    "group_size",
    "outlier_channels",
    "rotate",
    "first_layers",
    "anchor_interval",
)


def in_option_words(error: XQuantError, options: argparse.Namespace) -> str:
    """The message of an error, with options in the place of the settings that they gave.

    ``setting 'bits': 5`` becomes ``--bits 5``; a setting that was given as JSON stays as it is.

    Args:
        error: the error.
        options: of the command.
    """
    message = str(error)
    if isinstance(error, RefusedError):  # speaks of options; where it names a setting, it means that
        return message
    in_json = getattr(options, "settings", None) or {}
    given = [name for name in _SETTINGS if getattr(options, name, None) is not None and name not in in_json]
    spoken = message
    for name in given:
        option = f"--{name.replace('_', '-')}"
        # With a value, as 'method': 'xquant-cl', and without.
        quoted = rf"(?:the )?(?:setting )?['\"]{name}(?:\.\w+)?['\"]"
        spoken = re.sub(rf"{quoted}: ['\"]([\w-]+)['\"]", rf"{option} \1", spoken)
        spoken = re.sub(rf"{quoted}: key (\d+) / value (\d+)", rf"{option} \1 \2", spoken)
        spoken = re.sub(rf"{quoted}: ", f"{option} ", spoken)
        spoken = re.sub(quoted, option, spoken)
    return spoken if spoken == message else spoken.replace("leave the setting out", "leave the option out")
