"""The same connector for a 16-bit cache, to compare with. Not for serving: see :class:`PlainPages`."""

from collections.abc import Mapping
from typing import Any

from xquant_vllm.plugin.connectors.connector import XQuantConnector


class PlainPages(XQuantConnector):
    """Moves pages of keys and values, whose meaning is that of the model: it goes by the model's name alone."""

    def fingerprint_parts(self, pages: list[Any]) -> Mapping[str, str]:
        """The name, and what pages look like."""
        return {"model": str(self._config.model_config.model), "rank": "0 of 1", "pages": str(pages)}
