"""The settings of the connector, as users write them in ``kv_connector_extra_config``."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import PydanticCustomError

from xquant_vllm.scheme.hot_share import parse_share
from xquant_vllm.scheme.setting_errors import refuse, validated

_KEY = "xquant: kv_connector_extra_config"
_FOLDER_ADVICE = "set the absolute path of a folder that the engines share"
_SIZE_ADVICE = 'set bytes such as 2147483648 or "2GiB", or 0 for no limit'
_ADVICE = {"folder": _FOLDER_ADVICE, "size": _SIZE_ADVICE}


class ConnectorSettings(BaseModel):
    """Checked once.

    Attributes:
        folder: absolute path of the folder that engines share.
        size: bytes that its files may take; those that were read or written longest ago go first. 0: no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    size: int = 8 << 30

    @field_validator("folder", mode="before")
    @classmethod
    def _absolute(cls, value: Any) -> Path:
        if not isinstance(value, (str, Path)) or not str(value):
            raise refuse("it is no path", _FOLDER_ADVICE)
        try:
            folder = Path(value).expanduser()
        except RuntimeError:  # no such user, or one without a home
            raise refuse("it names a home that is not known", _FOLDER_ADVICE) from None
        if not folder.is_absolute():
            raise refuse("it depends on where a server was started", _FOLDER_ADVICE)
        return folder

    @field_validator("size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> int:
        try:
            size = parse_share(value)
        except PydanticCustomError:
            size = None
        if not isinstance(size, int):
            raise refuse("it is no number of bytes", _SIZE_ADVICE)
        return size


def connector_settings(vllm_config: Any) -> ConnectorSettings:
    """Those of an engine.

    Raises:
        SettingsError: one of them cannot work.
    """
    return validated(vllm_config.kv_transfer_config.kv_connector_extra_config, ConnectorSettings, _KEY, _ADVICE)
