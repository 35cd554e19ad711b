"""A model folder's factors and the user's settings: which wins, and when they contradict each other."""

import json
import shlex
from pathlib import Path
from typing import Any

from xquant_vllm.integration.factor_header import ChainSettings, FactorHeader, read_header
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
    options = f" {options}" if options else ""
    chain = None if header is None else header.settings.chain
    if chain is not None and "--method" not in options:
        # What makes the same chain, but for the option that is to be another.
        for option, value in (
            ("--first-layers", chain.first_layers),
            ("--anchor-interval", chain.anchor_interval),
            ("--bits", chain.bits),
        ):
            if option not in options:
                options = f" {option} {value}{options}"
        options = f" --method xquant-cl{options}"
    if header is not None and header.calibration is not None:
        text = header.calibration.text
        options += f" --calibration {shlex.quote(text)} --calibration-tokens {header.calibration.tokens}"
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
    built_in: dict[str, Any] = {
        "method": "xquant",
        "rotate": made_for.rotate,
        "outlier_channels": PerStream(key=made_for.outlier_channels.key, value=made_for.outlier_channels.value),
    }
    if made_for.chain is None:
        built_in["basis"] = made_for.basis
    else:
        built_in |= _chain_settings(made_for.chain)
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
    if made_for.chain is None and "bits" not in given and made_for.bits is not None:
        built_in["bits"] = PerStream(key=made_for.bits.key, value=made_for.bits.value)
    return settings.model_copy(update=built_in)


def _chain_settings(chain: ChainSettings) -> dict[str, Any]:
    def both(bits: int) -> PerStream:
        return PerStream(key=bits, value=bits)

    return {
        "method": "xquant-cl",
        "cache": "latent",
        "bits": both(chain.bits),
        "group_size": chain.group_size,
        "first_layers": chain.first_layers,
        "first_layers_bits": both(chain.first_layers_bits) if chain.first_layers else None,
        "anchor_interval": chain.anchor_interval,
        "anchor_bits": both(chain.anchor_bits) if chain.anchor_interval else None,
        "skip_layers": (),
    }


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, PerStream) else json.dumps(value)
