"""What the scheduler's side of the connector asks of the workers' side in a step."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata


class Page(NamedTuple):
    """The pages of a block, in all layers of its group.

    Attributes:
        group: KV cache group.
        key: of the tokens up to its end (keys.py).
        block: where they are, or shall be, in the cache.
    """

    group: int
    key: bytes
    block: int


@dataclass
class PageTransfers(KVConnectorMetadata):
    """Of one step.

    Attributes:
        loads: by request, pages to read before it goes on.
        saves: pages that are whole once the step is done.
    """

    loads: dict[str, list[Page]] = field(default_factory=dict)
    saves: list[Page] = field(default_factory=list)


@dataclass
class RankPages(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler once its model is loaded.

    Attributes:
        fingerprint: ``[16]``, of this rank.
        page_bytes: of every KV cache group, bytes of a block's pages in all layers of the rank.
    """

    fingerprint: bytes
    page_bytes: tuple[int, ...]


def blocks_written(metadata: Any) -> list[int] | None:
    """Blocks whose pages something else than the store writes, in this step or before they are first attended to.

    Args:
        metadata: of a step, of any connector; None without one.

    Returns:
        Their ids, or None where it cannot be known.
    """
    if metadata is None:
        return []
    if isinstance(metadata, PageTransfers):
        return [page.block for pages in metadata.loads.values() for page in pages]
    reads = getattr(metadata, "reqs_to_recv", None)  # of vLLM's NixlConnector
    if reads is not None:
        return [block for read in reads.values() for group in read.local_block_ids for block in group]
    jobs = getattr(metadata, "load_jobs", None)  # of vLLM's OffloadingConnector
    if jobs is None:
        return None
    return [int(block) for job in jobs.values() for block in job.dst_spec.block_ids]
