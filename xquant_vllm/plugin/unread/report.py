"""Says once, where an engine's configuration is made, what of it has no effect.

That is the process that a user starts: its command line is there as it was given, the configuration is complete but for
what calibration adds, and no rank is there yet.
"""

import logging
import multiprocessing
import os
from collections.abc import Mapping
from typing import Any

from xquant_vllm.errors import SettingsError
from xquant_vllm.plugin.drafts import WITHOUT_DRAFT_LAYERS
from xquant_vllm.plugin.kept_folder import KEPT_KEY
from xquant_vllm.plugin.ranks import FACTS_KEY, VERSION_KEY
from xquant_vllm.plugin.registration import selected_backends
from xquant_vllm.plugin.unread.additional import lost_settings
from xquant_vllm.plugin.unread.elsewhere import lost_elsewhere
from xquant_vllm.plugin.unread.names import KEYS, Lost

logger = logging.getLogger("vllm.xquant_vllm")

# As vLLM calls the processes that answer requests beside each other, each of which makes the configuration again.
_API_SERVER = "ApiServer_"
# What this package notes in a configuration, from which another one may be made.
_OF_THIS_PACKAGE = (VERSION_KEY, FACTS_KEY, KEPT_KEY)


def report_unread(arguments: Any, vllm_config: Any) -> None:
    """Warn of what has no effect, and refuse what can only have been meant for a backend of this package that serves.

    Servers with other backends are never refused.

    Args:
        arguments: vLLM's ``EngineArgs``.
        vllm_config: the configuration that was made of them.

    Raises:
        SettingsError: a setting is not where it is read; it names the setting, and the option to give instead.
    """
    if not _speaks_for_all():
        return
    read = _read_keys(vllm_config)
    try:
        lost = _lost(arguments, vllm_config, read)
    except Exception:
        # Of another backend's server this package is not to be the end.
        if read:
            raise
        logger.debug("xquant: settings without effect were not looked for", exc_info=True)
        return
    for one in lost:
        if not (one.certain and read):
            logger.warning("xquant: %s", one.text)
    refused = [f"xquant: {one.text}" for one in lost if one.certain and read]
    if refused:
        raise SettingsError("\n".join(refused))


def _lost(arguments: Any, vllm_config: Any, read: list[str]) -> list[Lost]:
    chosen = getattr(vllm_config.attention_config.backend, "name", None)
    instead = "no --attention-backend is given" if chosen is None else f"--attention-backend is {chosen}"
    additional = getattr(arguments, "additional_config", None)
    lost: list[Lost] = []
    if isinstance(additional, Mapping):
        given = {word: value for word, value in additional.items() if word not in _OF_THIS_PACKAGE}
        lost += lost_settings(given, read, instead)
    return [*lost, *lost_elsewhere(arguments, vllm_config, read, instead)]


def _read_keys(vllm_config: Any) -> list[str]:
    """Keys of the backends that serve: layers of the model, or those of a draft."""
    names = [name.lower() for name in selected_backends(vllm_config.attention_config)]
    speculative = vllm_config.speculative_config
    draft = getattr(getattr(speculative, "attention_backend", None), "name", "").lower()
    if draft in KEYS and draft not in names and speculative.method not in WITHOUT_DRAFT_LAYERS:
        names.append(draft)
    return names


def _speaks_for_all() -> bool:
    """Whether this process is the first of an engine's: not another one that answers requests, nor a later rank."""
    answers = multiprocessing.current_process().name.startswith(_API_SERVER)
    return not answers and os.environ.get("VLLM_DP_RANK", "0") == "0"
