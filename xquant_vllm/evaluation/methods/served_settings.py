"""The settings of a served method, over those that the model's folder was made for."""

from xquant_vllm.evaluation.methods.method_options import MethodOptions
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.scheme.factor_conflicts import factors_in, over_factors
from xquant_vllm.scheme.factor_header import FactorHeader
from xquant_vllm.scheme.settings import XQuantSettings, parse_settings


def served_settings(
    method: str, options: MethodOptions, checkpoint: Checkpoint
) -> tuple[XQuantSettings, FactorHeader | None]:
    """The settings as a server would have them, and the header of the folder's factors, if there are any.

    Args:
        method: ``"xquant"`` or ``"xquant-cl"``.
        options: what the user says about it.
        checkpoint: the model.

    Raises:
        RefusedError: an option cannot work.
        SettingsError: a setting cannot work, or contradicts the folder's factors.
    """
    options.check(method)
    header = factors_in(checkpoint.folder)
    return over_factors(parse_settings(options.server_settings(method)), checkpoint.folder, header), header
