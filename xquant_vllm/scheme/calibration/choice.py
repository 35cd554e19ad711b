"""What the setting ``"calibration"`` makes of the other settings: whether to calibrate, and with which basis.

The rule is what docs/accuracy.md shows. Below 4 bits latents per head lose several times less calibrated, and so do
joint latents and chains at 4 bits. For a *single* kv head one latent for its keys and values loses less than one for
each (Gemma 3), and there are no heads whose latents it would mix. So a single kv head gets that one.
"""

from dataclasses import dataclass
from typing import Literal

from xquant_vllm.errors import SettingsError
from xquant_vllm.scheme.calibration.texts import MIXED_TEXT
from xquant_vllm.scheme.settings import XQuantSettings

AUTO, NONE = "auto", "none"
# What a channel can be given, on average: with more, a budget would not be spent.
CALIBRATED_BITS = (8, 4, 3, 2)
# Settings that say themselves what is stored of a channel.
_DECIDED = ("group_size", "rotate", "outlier_channels", "skip_layers", "first_layers_bits", "anchor_bits")


@dataclass(frozen=True)
class ModelShape:
    """What of a model and its ranks the choice depends on.

    Attributes:
        hidden_size: channels of the layer input.
        kv_heads: kv heads of the whole model.
        head_size: channels of a head.
        ranks: of tensor parallelism.
    """

    hidden_size: int
    kv_heads: int
    head_size: int
    ranks: int = 1

    @property
    def narrow(self) -> bool:
        """Whether the layer input has fewer channels than keys and values (multi-head attention)."""
        return self.hidden_size < 2 * self.kv_heads * self.head_size


@dataclass(frozen=True)
class CalibrationChoice:
    """What to calibrate.

    Attributes:
        text: a name in :data:`xquant_vllm.scheme.calibration.texts.BUILT_IN`, or a file.
        basis: ``"head"`` or ``"joint"``. None leaves it to the calibration: in a chain, whose latents are joint in any
            case, and where the layer input is narrower than keys and values, which asks for joint latents unless a norm
            over all key heads together, which only a checkpoint tells of, forbids them.
    """

    text: str
    basis: Literal["head", "joint"] | None


def choose_calibration(settings: XQuantSettings, shape: ModelShape) -> CalibrationChoice | None:
    """What settings ask for on a model; None for factors from the weights alone.

    Ask :func:`why_not_calibrated` first: this one takes it for granted that calibration is possible.

    Args:
        settings: the user's.
        shape: the model's.
    """
    if settings.calibration == NONE:
        return None
    bits, basis = min(settings.bits.key, settings.bits.value), _basis(settings, shape)
    if settings.calibration != AUTO:
        return CalibrationChoice(settings.calibration, basis)
    asked_joint = settings.method == "xquant-cl" or settings.basis == "joint"
    if bits > 4 or (bits == 4 and not asked_joint):
        return None
    return CalibrationChoice(MIXED_TEXT, basis)


def _basis(settings: XQuantSettings, shape: ModelShape) -> Literal["head", "joint"] | None:
    """The basis that is asked for, or else the one that loses least among those that the ranks can share."""
    if settings.method == "xquant-cl":
        return None
    if "basis" in settings.model_fields_set:
        return settings.basis
    if shape.ranks > 1:
        return "head"
    if shape.narrow:
        return None
    return "joint" if shape.kv_heads == 1 else "head"


def why_not_calibrated(settings: XQuantSettings, shape: ModelShape) -> str | None:
    """Why factors for these settings cannot be calibrated, as far as the settings tell; None if they can.

    Args:
        settings: the user's.
        shape: the model's.

    Returns:
        The end of a sentence that begins with what was not done: "the setting ... decides what is stored".
    """
    bits = settings.bits
    if bits.key != bits.value or bits.key not in CALIBRATED_BITS:
        return f"the setting 'bits' is {bits}, and one number, 8, 4, 3 or 2, is shared out among keys and values"
    given = settings.model_fields_set
    chained = settings.method == "xquant-cl"
    decided = [
        *(name for name in _DECIDED if name in given and getattr(settings, name) != _default(name)),
        *(["cache"] if settings.cache == "x" else []),
        *(["first_layers"] if settings.first_layers and not chained else []),
    ]
    if decided:
        return f"the setting {decided[0]!r} says itself what is stored of every channel"
    if shape.ranks > 1 and (chained or ("basis" in given and settings.basis == "joint")):
        what = "'method': 'xquant-cl'" if chained else "'basis': 'joint'"
        return f"with the setting {what} calibrated latents do not shard over {shape.ranks} tensor-parallel ranks"
    if not settings.factor_cache:
        return "the setting 'factor_cache': false lets nothing be kept"
    return None


def cannot_calibrate(text: str, reason: str) -> SettingsError:
    """The error where a user's text cannot be calibrated on.

    Args:
        text: the user's.
        reason: see :func:`why_not_calibrated`.
    """
    return SettingsError(
        f"xquant: setting 'calibration': {text!r} cannot work: {reason}; set "
        '"calibration": "none" for factors from the weights alone'
    )


def _default(name: str) -> object:
    return XQuantSettings.model_fields[name].default
