"""A model folder's factors and the user's settings: which wins, and when they contradict each other."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

from xquant_vllm.codec.packing import UNQUANTIZED_BITS
from xquant_vllm.errors import FactorFileError, SettingsError
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE
from xquant_vllm.scheme.calibration.request import is_kept
from xquant_vllm.scheme.calibration.texts import BUILT_IN, PYTHON_DOCS
from xquant_vllm.scheme.factor_header import FactorHeader, FactorSettings, read_header
from xquant_vllm.scheme.settings import NOT_STORED, PerStream, XQuantSettings

# Built into all calibrated factors: they know of nothing else.
_CALIBRATED: dict[str, Any] = {
    name: XQuantSettings.model_fields[name].default
    for name in (
        *("group_size", "rotate", "outlier_channels", "skip_layers", "first_layers", "first_layers_bits"),
        *("anchor_interval", "anchor_bits"),
    )
} | {"cache": "latent"}
_CHAIN_OPTIONS = ("--first-layers", "--anchor-interval")


def factors_in(folder: Path) -> FactorHeader | None:
    """The header of a folder's factors; None for a folder without.

    Raises:
        SettingsError: the header cannot be used.
    """
    try:
        header = read_header(folder)
        if header is None and os.path.lexists(folder / FACTORS_FILE):
            raise FactorFileError("is missing")
        return header
    except FactorFileError as error:
        raise refuse_factors(folder / HEADER_FILE, str(error), None) from None


def refuse_factors(path: Path, problem: str, header: FactorHeader | None, options: str | None = "") -> SettingsError:
    """The error for factors that cannot be used.

    Args:
        path: the file.
        problem: what is wrong with it, a verb first.
        header: what it says about itself, if that can be read and is to be made so again.
        options: of the command that makes it anew, over those of the header; None if there is no such command.
    """
    if is_kept(path.parent):
        return SettingsError(f"xquant: {path} {problem}; remove {path.parent}, and the next start makes it anew")
    if options is None:
        return SettingsError(f"xquant: {path} {problem}; serve the model that it was made from")
    given = shlex.split(options)
    remake = {} if header is None else _remake(header)
    if "--method" in given:
        # The command refuses what has no use with a method.
        useless = ("--basis",) if "xquant-cl" in given else _CHAIN_OPTIONS
        remake = {option: values for option, values in remake.items() if option not in useless}
    for option, values in remake.items():
        if option not in given and option.replace("--no-", "--") not in given:
            given += [option, *values]
    words = "".join(f" {shlex.quote(word)}" for word in given)
    folder = shlex.quote(str(path.parent))
    text = given[given.index("--calibration") + 1] if "--calibration" in given else PYTHON_DOCS
    # A header knows no paths of the machine that it was made on.
    note = "" if text in BUILT_IN else f" (with the path of {text})"
    return SettingsError(
        f"xquant: {path} {problem}; make it anew with `xquant factorize {folder} --out {folder}{words} --force`{note}, "
        "or serve the model that it was made from"
    )


def over_factors(settings: XQuantSettings, folder: Path | None, header: FactorHeader | None) -> XQuantSettings:
    """The user's settings over those that the model folder's factors were made for, if it has any.

    Args:
        settings: the user's.
        folder: the model's folder.
        header: of its factors.

    Raises:
        SettingsError: a setting contradicts what is built into the factors.
    """
    if folder is None or header is None:
        return settings
    given, made_for = settings.model_fields_set, header.settings
    if made_for.allocation is None:
        built_in: dict[str, Any] = {
            "method": "xquant",
            "basis": made_for.basis,
            "rotate": made_for.rotate,
            "outlier_channels": made_for.outlier_channels,
        }
    else:
        built_in = _calibrated_settings(made_for)
    # What is given as None is left to the package.
    contradicted = [
        name for name in built_in if name in given and getattr(settings, name) not in (None, built_in[name])
    ]
    if contradicted:
        made = " and ".join(f"{name} {_plain(built_in[name])}" for name in contradicted)
        asked = " and ".join(
            f"the setting {name!r} asks for {_plain(getattr(settings, name))}" for name in contradicted
        )
        raise refuse_factors(
            folder / HEADER_FILE,
            f"is made with {made}, but {asked} (leave the setting out to serve it as it is)",
            *_remedy(settings, header, built_in["method"]),
        )
    if made_for.allocation is None and "bits" not in given and made_for.bits is not None:
        built_in["bits"] = made_for.bits
    return settings.model_copy(update=built_in)


def _remedy(settings: XQuantSettings, header: FactorHeader, method: str) -> tuple[FactorHeader | None, str | None]:
    """Factors that the user's settings can be served with: a header to follow, and options over it."""
    given = {name for name in settings.model_fields_set if getattr(settings, name) is not None}
    method = settings.method if "method" in given else method
    chained = method == "xquant-cl"
    bits = settings.bits
    ours = {"method", "bits", *NOT_STORED} | ({"first_layers", "anchor_interval"} if chained else {"basis"})
    fixed = _CALIBRATED | {"basis": "joint"}
    plain = all(name in ours or getattr(settings, name) == fixed[name] for name in given)
    can_calibrate = plain and bits.key == bits.value and bits.key != UNQUANTIZED_BITS
    if not can_calibrate and chained:
        return None, None
    calibrated = chained or (can_calibrate and header.calibration is not None)
    options = {
        "method": f"--method {method}",
        "bits": f"--bits {' '.join(_numbers(bits))}",
        "anchor_interval": f"--anchor-interval {settings.anchor_interval}",
        "first_layers": f"--first-layers {settings.first_layers}",
        "basis": f"--basis {settings.basis}",
        "rotate": "--rotate" if settings.rotate else "--no-rotate",
        "outlier_channels": f"--outlier-channels {settings.outlier_channels.key} {settings.outlier_channels.value}",
    }
    names = ["method", "bits", "anchor_interval", "first_layers", "basis", "rotate", "outlier_channels"]
    if calibrated:
        names = [name for name in names if name in ours]
    else:
        names = [name for name in names if name not in ("anchor_interval", "first_layers")]
    words = [options[name] for name in names if name in given]
    if calibrated == (header.calibration is not None):
        return header, " ".join(words)
    # From data-free to a chain, or from calibrated to data-free.
    if calibrated:
        words.append(f"--calibration {PYTHON_DOCS}")
    if header.dtype != "bfloat16":
        words.append(f"--dtype {header.dtype}")
    return None, " ".join(words)


def _calibrated_settings(made_for: FactorSettings) -> dict[str, Any]:
    """What is built into calibrated factors, besides: all that decides what is stored in how many bits."""
    assert made_for.bits is not None
    built_in = _CALIBRATED | {
        "method": "xquant" if made_for.chain is None else "xquant-cl",
        "basis": made_for.basis,
        "bits": made_for.bits,
    }
    return built_in if made_for.chain is None else built_in | made_for.chain.model_dump()


def _remake(header: FactorHeader) -> dict[str, list[str]]:
    """Options of `xquant factorize` that make the same factors; its defaults are left out."""
    settings, calibration = header.settings, header.calibration
    options: dict[str, list[str]] = {}
    if settings.chain is not None:
        options |= {
            "--method": ["xquant-cl"],
            "--first-layers": [str(settings.chain.first_layers)],
            "--anchor-interval": [str(settings.chain.anchor_interval)],
        }
    elif calibration is not None or settings.basis != "head":
        options["--basis"] = [settings.basis]
    if settings.bits is not None:
        options["--bits"] = _numbers(settings.bits)
    if calibration is not None:
        options |= {"--calibration": [calibration.text], "--calibration-tokens": [str(calibration.tokens)]}
    else:
        outliers = settings.outlier_channels
        if not settings.rotate:
            options["--no-rotate"] = []
        if (outliers.key, outliers.value) != (1, 0):
            options["--outlier-channels"] = [str(outliers.key), str(outliers.value)]
    if header.dtype != "bfloat16":
        options["--dtype"] = [header.dtype]
    return options


def _numbers(bits: PerStream) -> list[str]:
    """Bits as `--bits` takes them: one number where both are the same."""
    return [str(number) for number in ((bits.key,) if bits.key == bits.value else (bits.key, bits.value))]


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, PerStream) else json.dumps(value)
