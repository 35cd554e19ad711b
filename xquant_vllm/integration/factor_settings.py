"""A model folder's factors and the user's settings: which wins, and when they contradict each other."""

import json
import shlex
from pathlib import Path
from typing import Any

from xquant_vllm.integration.factor_header import FactorHeader, FactorSettings, read_header
from xquant_vllm.integration.settings import PerStream, SettingsError, XQuantSettings
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE, FactorFileError


def factors_of(vllm_config: Any) -> tuple[Path | None, FactorHeader | None]:
    """The model's folder and the header of its factors; None for a model without.

    Raises:
        SettingsError: the header cannot be used.
    """
    model = getattr(getattr(vllm_config, "model_config", None), "model", None)
    if not isinstance(model, str) or not Path(model).is_dir():
        return None, None
    return Path(model), factors_in(Path(model))


def factors_in(folder: Path) -> FactorHeader | None:
    """The header of a folder's factors; None for a folder without.

    Raises:
        SettingsError: the header cannot be used.
    """
    try:
        header = read_header(folder)
        if header is None and (folder / FACTORS_FILE).exists():
            raise FactorFileError("is missing")
        return header
    except FactorFileError as error:
        raise refuse_factors(folder / HEADER_FILE, str(error), None) from None


def refuse_factors(path: Path, problem: str, header: FactorHeader | None, options: str = "") -> SettingsError:
    """The error for factors that cannot be used.

    Args:
        path: the file.
        problem: what is wrong with it, a verb first.
        header: what it says about itself, if that can be read.
        options: of the command that makes it anew.
    """
    remake = {} if header is None else _remake(header)
    given = shlex.split(options)
    for option, value in remake.items():
        if option not in given:
            given += [option, value]
    options = "".join(f" {shlex.quote(word)}" for word in given)
    folder = shlex.quote(str(path.parent))
    return SettingsError(
        f"xquant: {path} {problem}; make it anew with `xquant factorize {folder} --out {folder}{options} --force`, or "
        "serve the model that it was made from"
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
            "outlier_channels": PerStream(key=made_for.outlier_channels.key, value=made_for.outlier_channels.value),
        }
    else:
        built_in = _calibrated_settings(made_for)
    options = {
        "method": f"--method {settings.method}",
        "bits": f"--bits {settings.bits.key}",
        "anchor_interval": f"--anchor-interval {settings.anchor_interval}",
        "first_layers": f"--first-layers {settings.first_layers}",
        "basis": f"--basis {settings.basis}",
        "rotate": "--rotate" if settings.rotate else "--no-rotate",
        "outlier_channels": f"--outlier-channels {settings.outlier_channels.key} {settings.outlier_channels.value}",
    }
    for name, value in built_in.items():
        if name in given and getattr(settings, name) != value:
            raise refuse_factors(
                folder / HEADER_FILE,
                f"is made with {name} {_plain(value)}, but the setting {name!r} asks for "
                f"{_plain(getattr(settings, name))} (leave the setting out to serve it as it is)",
                header,
                options.get(name, ""),
            )
    if made_for.allocation is None and "bits" not in given and made_for.bits is not None:
        built_in["bits"] = PerStream(key=made_for.bits.key, value=made_for.bits.value)
    return settings.model_copy(update=built_in)


def _calibrated_settings(made_for: FactorSettings) -> dict[str, Any]:
    """What is built into calibrated factors: all that decides which channels are stored in how many bits."""
    assert made_for.bits is not None
    names = ("cache", "group_size", "rotate", "outlier_channels", "skip_layers", "first_layers_bits", "anchor_bits")
    defaults = {name: XQuantSettings.model_fields[name].default for name in (*names, "first_layers", "anchor_interval")}
    built_in = defaults | {
        "method": "xquant" if made_for.chain is None else "xquant-cl",
        "cache": "latent",
        "basis": made_for.basis,
        "bits": PerStream(key=made_for.bits.key, value=made_for.bits.value),
    }
    return built_in if made_for.chain is None else built_in | made_for.chain.model_dump()


def _remake(header: FactorHeader) -> dict[str, str]:
    """Options of `xquant factorize` that make the same factors."""
    options: dict[str, str] = {}
    chain, calibration = header.settings.chain, header.calibration
    if chain is not None:
        options |= {
            "--method": "xquant-cl",
            "--first-layers": str(chain.first_layers),
            "--anchor-interval": str(chain.anchor_interval),
        }
    elif calibration is not None:
        options["--basis"] = header.settings.basis
    if calibration is not None:
        if header.settings.bits is not None:
            options["--bits"] = str(header.settings.bits.key)
        options |= {"--calibration": calibration.text, "--calibration-tokens": str(calibration.tokens)}
    return options


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, PerStream) else json.dumps(value)
