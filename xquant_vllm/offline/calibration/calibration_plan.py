"""What is to be fitted to a text, as settings ask for it."""

from dataclasses import dataclass

from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.option_values import spaced
from xquant_vllm.projection.calibrated import layer_budget
from xquant_vllm.projection.predicted import layers_of_groups
from xquant_vllm.scheme.calibration.choice import CALIBRATED_BITS
from xquant_vllm.scheme.settings import XQuantSettings


@dataclass(frozen=True)
class CalibrationPlan:
    """What is to be fitted.

    Attributes:
        joint_kv: one latent for keys and values of all kv heads, instead of one for each and every kv head.
        budget: bytes per token of every layer.
        anchors: of a joint latent, which layers nothing predicts.
    """

    joint_kv: bool
    budget: int
    anchors: tuple[bool, ...]

    @property
    def layers_of_groups(self) -> list[int]:
        """For every layer, how many layers its group has so far, itself included."""
        return layers_of_groups(self.anchors)


def plan_calibration(checkpoint: Checkpoint, settings: XQuantSettings) -> CalibrationPlan:
    """What settings ask for.

    Raises:
        RefusedError: they ask for what is not fitted.
    """
    bits = settings.bits
    if bits.key != bits.value or bits.key not in CALIBRATED_BITS:
        raise RefusedError(
            f"xquant: --bits {spaced((bits.key, bits.value) if bits.key != bits.value else bits.key)} cannot work with "
            "--calibration, which shares one budget out among keys, values and their channels: set one number, 8, 4, 3 "
            "or 2"
        )
    chained = settings.method == "xquant-cl"
    narrow = checkpoint.hidden_size < 2 * checkpoint.kv_heads * checkpoint.head_size
    joint_kv = chained or settings.basis == "joint" or ("basis" not in settings.model_fields_set and narrow)
    if any(checkpoint.keys_normed_together(layer) for layer in range(checkpoint.layers)):
        # Key latents are cached divided by what the norm divides keys by, and values are not.
        if chained or settings.basis == "joint":
            raise RefusedError(
                f"xquant: {'--method xquant-cl' if chained else '--basis joint'} cannot work with --calibration on "
                f"{checkpoint.name}, which normalizes the keys of all heads together, so that keys and values cannot "
                "share what is cached: set --method xquant --basis head"
            )
        joint_kv = False
    sizes = (checkpoint.kv_heads, checkpoint.head_size, checkpoint.hidden_size)
    budget = layer_budget(*sizes, bits.key, joint_kv=joint_kv)
    filled = settings.for_chain("latent")
    anchors = tuple(not chained or filled.is_anchor(layer) for layer in range(checkpoint.layers))
    return CalibrationPlan(joint_kv, budget, anchors)
