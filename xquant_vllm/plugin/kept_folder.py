"""Which folder has an engine's calibrated factors: written into its configuration, which travels to all ranks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# In `additional_config`: the model, and the folder. A draft's configuration has those of the model that it is for.
KEPT_KEY = "xquant_calibrated"


def write_kept_folder(vllm_config: Any, folder: Path) -> None:
    """Note the folder of factors for a configuration's model."""
    kept = {"model": vllm_config.model_config.model, "folder": str(folder)}
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), KEPT_KEY: kept}


def kept_folder(vllm_config: Any) -> Path | None:
    """The folder of factors for a configuration's model; None if none was noted."""
    additional = getattr(vllm_config, "additional_config", None)
    kept = additional.get(KEPT_KEY) if isinstance(additional, Mapping) else None
    if kept is None or kept["model"] != getattr(vllm_config.model_config, "model", None):
        return None
    return Path(kept["folder"])
