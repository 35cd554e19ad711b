"""The connector as vLLM sees it: pages go through files in a folder that engines share."""

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, group_kernel_blocks
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from xquant_vllm.plugin.connectors.fingerprint import different_parts, fingerprint_of, fingerprint_parts
from xquant_vllm.plugin.connectors.folder_size import FolderSize
from xquant_vllm.plugin.connectors.groups import page_groups, pages_of
from xquant_vllm.plugin.connectors.names import XQUANT_CONNECTOR
from xquant_vllm.plugin.connectors.page_files import PageFolder
from xquant_vllm.plugin.connectors.scheduler_side import SchedulerSide
from xquant_vllm.plugin.connectors.settings import connector_settings
from xquant_vllm.plugin.connectors.transfers import PageTransfers, RankPages
from xquant_vllm.plugin.connectors.worker_side import GroupPages, WorkerSide
from xquant_vllm.plugin.refusals import announced

logger = logging.getLogger("vllm.xquant_vllm")

ABOUT_FILE = "about.json"


class XQuantConnector(KVConnectorBase_V1, SupportsHMA):
    """Whole pages, as the bytes that they are, by block.

    Reading is asynchronous to vLLM: a request waits for a step while its pages are read. If a file turns out to be bad,
    the request is computed as if there were none, with any number of KV cache groups.
    """

    _cache_hit_source = CacheHitSource.DISK

    @announced()
    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Prepare one of the two sides.

        Raises:
            SettingsError: a setting of the connector cannot work.
            UnsupportedError: a layer keeps something else than a page for every block of tokens.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        self._config, self._num_blocks = vllm_config, kv_cache_config.num_blocks
        self._settings = connector_settings(vllm_config)
        self._groups = page_groups(kv_cache_config, XQUANT_CONNECTOR)
        transfer = vllm_config.kv_transfer_config
        self._transfers = PageTransfers()
        self._read: set[str] = set()
        self._failed: set[str] = set()
        self._rank_pages: RankPages | None = None
        self.worker: WorkerSide | None = None
        self.scheduler: SchedulerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerSide(
                self._settings.folder, self._groups, reads=transfer.is_kv_consumer, writes=transfer.is_kv_producer
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """Pages are written in the step that fills them: a request that ends early leaves nothing behind."""
        return False

    def fingerprint_parts(self, pages: list[Any]) -> Mapping[str, str]:
        """What tells this engine's pages from others'; see fingerprint.py.

        Args:
            pages: what is known of the pages of every KV cache group.
        """
        return fingerprint_parts(self._config, pages)

    # The worker's side.

    @announced()
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the layers' caches; the model is loaded.

        Raises:
            UnsupportedError: none of its layers is one of this package.
        """
        blocks = {name: group_kernel_blocks(cache, self._num_blocks) for name, cache in kv_caches.items()}
        groups = [GroupPages(group, blocks) for group in self._groups]
        parts = self.fingerprint_parts(pages_of(self._groups, blocks))
        fingerprint = fingerprint_of(parts)
        self._rank_pages = RankPages(fingerprint, tuple(group.page_bytes for group in groups))
        folder = PageFolder(self._settings.folder, fingerprint, self._rank_pages.page_bytes)
        self.worker = WorkerSide(groups, folder, FolderSize(self._settings.folder, self._settings.size))
        if self._config.kv_transfer_config.is_kv_producer:
            _write_about(folder.folder, parts)
        _say(folder.folder, parts)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the scheduler must know of this rank's pages."""
        return self._rank_pages

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Read the pages that requests wait for."""
        assert self.worker is not None
        loads = self._of_step().loads
        self._failed = self.worker.load(loads)
        self._read = set(loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No layer of a step reads what is read in that step."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Pages are written when all layers have filled them."""

    def wait_for_save(self) -> None:
        """Write the pages that this step has filled."""
        assert self.worker is not None
        self.worker.save(self._of_step().saves)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose pages were read in this step, and those among them of which a file was bad."""
        read, self._read = self._read, set()
        failed, self._failed = self._failed, set()
        return KVConnectorTransferResults(finished_recving=read, failed_recving=failed)

    def shutdown(self) -> None:
        """Say what was moved."""
        if self.worker is not None:
            self.worker.say()

    def _of_step(self) -> PageTransfers:
        transfers = self._get_connector_metadata()
        assert isinstance(transfers, PageTransfers)
        return transfers

    # The scheduler's side.

    @property
    def _side(self) -> SchedulerSide:
        assert self.scheduler is not None
        return self.scheduler

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Take what all ranks say of their pages."""
        ranks = [rank for _, rank in sorted(metadata.items(), key=lambda item: item[0])]
        self._side.set_ranks(rank for rank in ranks if isinstance(rank, RankPages))

    def on_new_request(self, request: Any) -> None:
        """A request has come."""
        self._side.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that files have beyond those of the engine's own cache, and whether they are read between steps."""
        tokens = self._side.more_tokens(request, num_computed_tokens)
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request has got blocks."""
        self._side.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> PageTransfers:
        """What is moved in this step."""
        return self._side.transfers(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Learn which files were bad."""
        self._side.failed(connector_output.failed_recving or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended; its blocks may go at once."""
        self._side.remove(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Likewise, with several KV cache groups."""
        return self.request_finished(request, [])


def _write_about(folder: Path, parts: Mapping[str, str]) -> None:
    """Say in the folder what its pages are of, for people and for :func:`_say`."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / ABOUT_FILE
        if not about.exists():
            about.write_text(json.dumps(dict(parts), indent=2, sort_keys=True) + "\n")


def _say(folder: Path, parts: Mapping[str, str]) -> None:
    """Say in the log where pages are, and why engines that seem to be alike do not share any."""
    logger.info("xquant: pages are shared with engines of the same fingerprint in %s", folder)
    with contextlib.suppress(OSError):
        for other in sorted(folder.parent.glob(f"*/{ABOUT_FILE}")):
            if other.parent == folder:
                continue
            with contextlib.suppress(OSError, ValueError):
                theirs = json.loads(other.read_text())
                # Ranks of one engine have different weights, so they would always differ.
                if theirs.get("rank") == parts["rank"] and theirs.get("model") == parts["model"]:
                    differ = different_parts(parts, theirs)
                    logger.info("xquant: not with those in %s, which have other: %s", other.parent, differ)
