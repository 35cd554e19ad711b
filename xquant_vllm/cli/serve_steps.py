"""What ``xquant serve`` says of its first steps: the cache that will be served, and where its factors come from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from xquant_vllm.cli.serve_config import number_of
from xquant_vllm.errors import FactorFileError, RefusedError
from xquant_vllm.planning.model_files import read_model_here
from xquant_vllm.planning.of_settings import SettingsPlan, plan_settings
from xquant_vllm.planning.report import label
from xquant_vllm.planning.serving import this_device
from xquant_vllm.scheme.calibration.choice import AUTO, NONE
from xquant_vllm.scheme.calibration.texts import text_name
from xquant_vllm.scheme.settings import XQuantSettings

_RANKS = ("--tensor-parallel-size", "-tp")


def serve_steps(
    model: str, settings: Mapping[str, Any], parsed: XQuantSettings, rest: Sequence[str]
) -> tuple[str, str]:
    """A line on the cache, and one on its factors.

    What cannot be planned here, such as a model that is not fetched yet, is left to vLLM, which refuses what it must.

    Args:
        model: folder or name.
        settings: the user's, as they were given.
        parsed: likewise, parsed.
        rest: the user's arguments for vLLM.

    Raises:
        SettingsError: the settings do not fit the model.
    """
    says = ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items()) or "the default settings"
    try:
        files = read_model_here(model)
        if files is None:
            return f"{model} with {says}; it is not on this machine yet, so sizes are told when it is", _asked(parsed)
        plan = plan_settings(files, parsed, number_of(rest, _RANKS) or 1, this_device())
    except (RefusedError, FactorFileError) as error:
        reason = str(error).splitlines()[0].removeprefix("xquant: ")
        return f"{model} with {says}; no sizes ({reason})", _asked(parsed)
    return f"{model} with {says}: {_sizes(plan, parsed)}", _factors(plan)


def _sizes(plan: SettingsPlan, parsed: XQuantSettings) -> str:
    name = label(plan.kind)
    if parsed.bits.key != parsed.bits.value:
        name = name.replace(f"{plan.kind.bits} bits", f"{parsed.bits} bits")
    text = (
        f"{name}: {plan.bytes_per_token:,} bytes per token, {plan.plain_bytes_per_token:,} at 16 bit "
        f"({plan.plain_bytes_per_token / plan.bytes_per_token:.2f}x)"
    )
    if plan.loss is None:
        return f"{text}; what it loses was not measured"
    of = f"{plan.losses.model}, {plan.losses.relation}"
    return f"{text}; expected loss {plan.loss.increase:+.2f} in perplexity (of {of})"


def _factors(plan: SettingsPlan) -> str:
    if plan.built_in:
        return "they are in the folder, which is served as it is"
    if plan.choice is not None:
        text = text_name(plan.choice.text)
        return f"calibrated on {text} by the server's first start, which takes minutes, and kept for later ones"
    made = "computed from the weights alone by the server's first start, and kept for later ones"
    return made if plan.not_calibrated is None else f"{made}; not calibrated, because {plan.not_calibrated}"


def _asked(parsed: XQuantSettings) -> str:
    """Of a model that nothing is known of."""
    how = {
        AUTO: "calibrated by the server's first start where that loses less",
        NONE: "computed from the weights alone by the server's first start",
    }.get(parsed.calibration, f"calibrated on {text_name(parsed.calibration)} by the server's first start")
    return f"{how}, and kept for later ones; a folder that has factors is served as it is"
