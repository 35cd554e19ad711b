"""Lets the server that is scraped show what workers write; see board.py."""

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from xquant_vllm.plugin.registration import BACKEND_NAME, selected_backends

logger = logging.getLogger("vllm.xquant_vllm")

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Of prometheus_client: the folder that processes share. vLLM sets it before it starts several API servers."""


def share_metrics(arguments: Any, vllm_config: Any) -> None:
    """Make room for an engine's metrics in the process that makes its configuration, before its workers start.

    Only where configurations are made: there the server is, too.

    Args:
        arguments: vLLM's ``EngineArgs``.
        vllm_config: the configuration that was made of them.
    """
    if not arguments.disable_log_stats and BACKEND_NAME in selected_backends(vllm_config.attention_config):
        open_folder(vllm_config)


def folder_of(vllm_config: Any) -> Path:
    """The folder of an engine's numbers, the same in all of its processes on a machine; it need not exist."""
    shared = os.environ.get(VARIABLE)
    return Path(shared) if shared else Path(tempfile.gettempdir()) / f"xquant-metrics-{vllm_config.instance_id}"


def open_folder(vllm_config: Any) -> None:
    """Make the folder and let the process's registry, which vLLM serves, read it when it is scraped.

    Between several API servers there is a folder of vLLM's, which it reads and removes itself.
    """
    if os.environ.get(VARIABLE):
        return
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    folder = folder_of(vllm_config)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        logger.warning(
            "xquant: metrics are off: %s cannot be made (%s); set TMPDIR to a folder that can be written",
            folder,
            error.strerror,
        )
        return
    atexit.register(_remove, folder, os.getpid())
    MultiProcessCollector(REGISTRY, str(folder))


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in processes that were forked
        shutil.rmtree(folder, ignore_errors=True)
