"""What some settings make of a model, before it is served: how the factors come about, bytes, and the expected loss."""

from dataclasses import dataclass

from xquant_vllm.planning.caches import CHAIN, HEAD, JOINT, PLAIN, Kind, X, layer_shapes, of_formats, pages
from xquant_vllm.planning.factor_folder import folder_formats, folder_losses, kind_of
from xquant_vllm.planning.losses import Loss, Losses, nearest_losses
from xquant_vllm.planning.model_files import ModelFiles
from xquant_vllm.planning.planned_model import PlannedModel, planned_model
from xquant_vllm.planning.serving import Device, Serving
from xquant_vllm.scheme.calibration.choice import (
    AUTO,
    CalibrationChoice,
    ModelShape,
    cannot_calibrate,
    choose_calibration,
    why_not_calibrated,
)
from xquant_vllm.scheme.factor_conflicts import factors_in, over_factors
from xquant_vllm.scheme.formats import LayerFormat, layer_formats
from xquant_vllm.scheme.settings import NOT_STORED, XQuantSettings

# What may be set without changing a loss beyond what rows of a plan tell.
_AS_MEASURED = {"bits", "method", "basis", "cache", *NOT_STORED}


@dataclass(frozen=True)
class SettingsPlan:
    """What will be served.

    Attributes:
        kind: the row of a plan that it belongs to.
        bytes_per_token: of all layers of a rank, in pages.
        plain_bytes_per_token: of a 16-bit cache.
        loss: expected, None where it was not measured, say with other groups.
        losses: where that comes from.
        built_in: whether the folder has the factors.
        choice: what is calibrated at the first start, None where nothing is.
        not_calibrated: why nothing is calibrated where it would lose less, None where there is no reason.
    """

    kind: Kind
    bytes_per_token: int
    plain_bytes_per_token: int
    loss: Loss | None
    losses: Losses
    built_in: bool
    choice: CalibrationChoice | None
    not_calibrated: str | None


def plan_settings(files: ModelFiles, settings: XQuantSettings, ranks: int, device: Device) -> SettingsPlan:
    """Plan one cache, of which no memory is known.

    Args:
        files: of the model.
        settings: the user's.
        ranks: of tensor parallelism.
        device: where it is served.

    Raises:
        RefusedError: the model cannot be planned.
        SettingsError: the settings do not fit it, or it cannot be calibrated on the user's text.
    """
    model = planned_model(files)
    serving = Serving(0, model.positions or 1, settings.hot, ranks, device, model.serving_dtype("auto"))
    losses = nearest_losses(model)
    header = None if files.folder is None else factors_in(files.folder)
    built_in, choice, not_calibrated = header is not None and header.settings.allocation is not None, None, None
    if header is not None and built_in:
        losses = folder_losses(files, header) or losses
        served = over_factors(settings, files.folder, header)
        kind, formats = kind_of(header), folder_formats(served, header, model, serving)
    else:
        shape = ModelShape(model.hidden_size, model.kv_heads, model.head_size, ranks)
        choice = None if header is not None else choose_calibration(settings, shape)
        if choice is not None:
            not_calibrated = why_not_calibrated(settings, shape) or _of_model(model)
            if not_calibrated is not None and settings.calibration != AUTO:
                raise cannot_calibrate(settings.calibration, not_calibrated)
            if not_calibrated is not None:
                choice = None
        formats = layer_formats(settings, layer_shapes(model, ranks))
        joint = _is_joint(settings, choice, shape.narrow and not model.keys_normed_together)
        kind = _kind(settings, formats[0], joint, calibrated=choice is not None)
        if choice is not None:
            formats = pages(kind, model, serving).formats
    return SettingsPlan(
        kind=kind,
        bytes_per_token=of_formats(formats, model, serving).bytes_per_token,
        plain_bytes_per_token=pages(Kind(PLAIN, 16), model, serving).bytes_per_token,
        loss=losses.of(kind) if built_in or choice is not None or _as_measured(settings) else None,
        losses=losses,
        built_in=built_in,
        choice=choice,
        not_calibrated=not_calibrated,
    )


def _as_measured(settings: XQuantSettings) -> bool:
    """Whether the expected loss is one of these settings, and not of others."""
    return settings.bits.key == settings.bits.value and settings.model_fields_set <= _AS_MEASURED


def _of_model(model: PlannedModel) -> str | None:
    return None if model.calibratable else "its weights are quantized, or of a structure that is not known"


def _is_joint(settings: XQuantSettings, choice: CalibrationChoice | None, joint_if_open: bool) -> bool:
    """Whether latents are joint; a choice may leave it to the calibration."""
    basis = settings.basis if choice is None else choice.basis
    return joint_if_open if basis is None else basis == "joint"


def _kind(settings: XQuantSettings, form: LayerFormat, joint: bool, *, calibrated: bool) -> Kind:
    """Which row of a plan this is."""
    if settings.method == "xquant-cl":
        method = CHAIN
    elif form.holds == "x" and not calibrated:
        method = X
    else:
        method = JOINT if joint else HEAD
    return Kind(method, settings.bits.key, calibrated)
