"""The settings of the connector."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from xquant_vllm.errors import SettingsError
from xquant_vllm.plugin.connectors.settings import ConnectorSettings, connector_settings


def settings(**raw):
    return connector_settings(SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=raw)))


def test_defaults():
    assert settings(folder="/pages") == ConnectorSettings(folder="/pages", size=8 << 30)


def test_values():
    assert settings(folder="~/pages").folder == Path.home() / "pages"
    assert settings(folder="/pages", size="500MB").size == 500_000_000
    assert settings(folder="/pages", size=0).size == 0
    assert settings(folder="/pages", size=1 << 40).size == 1 << 40


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({}, ["'folder'", "set the absolute path"]),
        ({"folder": "pages"}, ["'folder': 'pages'", "where a server was started", "set the absolute path"]),
        ({"folder": ""}, ["'folder'", "no path"]),
        ({"folder": 7}, ["'folder': 7", "no path"]),
        ({"folder": "~nobody-of-that-name/x"}, ["'folder'", "a home that is not known"]),
        ({"folder": "/x", "size": "20%"}, ["'size': '20%'", "set bytes such as"]),
        ({"folder": "/x", "size": 0.5}, ["'size': 0.5", "set bytes such as"]),
        ({"folder": "/x", "size": -1}, ["'size': -1", "set bytes such as"]),
        ({"folder": "/x", "size": "large"}, ["'size': 'large'", "set bytes such as"]),
        ({"folder": "/x", "size": True}, ["'size': True", "set bytes such as"]),
        ({"folder": "/x", "size": None}, ["'size': None", "set bytes such as"]),
        ({"folder": "/x", "foldr": "/y"}, ["unknown setting 'foldr'", "did you mean 'folder'?"]),
        ({"shared_storage_path": "/x"}, ["unknown setting 'shared_storage_path'"]),
    ],
)
def test_refusals_name_the_setting_and_the_remedy(raw, parts):
    with pytest.raises(SettingsError) as error:
        settings(**raw)
    assert str(error.value).startswith("xquant: kv_connector_extra_config: ")
    for part in parts:
        assert part in str(error.value)
