"""Fixtures of the tests of features."""

import pytest

from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny checkpoint of a family, written once."""
    folders = {}

    def tiny(family):
        if family not in folders:
            folders[family] = save_tiny_model(tmp_path_factory.mktemp(family) / "a", family)
        return folders[family]

    return tiny
