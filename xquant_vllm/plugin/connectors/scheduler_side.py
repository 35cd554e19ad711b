"""The connector beside vLLM's scheduler: which pages a request can have from files, and which are to be written."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xquant_vllm.plugin.connectors.groups import PageGroup, common_end, common_step
from xquant_vllm.plugin.connectors.keys import TokenKeys
from xquant_vllm.plugin.connectors.page_files import PageFolder
from xquant_vllm.plugin.connectors.transfers import Page, PageTransfers, RankPages


@dataclass
class _Known:
    """What is known of a request.

    Attributes:
        request: vLLM's ``Request``.
        keys: of its tokens.
        start: tokens that the engine's own cache had when files were last asked for.
        saved: of every group, blocks from the first that need not be written any more.
        failed: whether files of it were found to be bad; then it has none.
    """

    request: Any
    keys: TokenKeys
    start: int = 0
    saved: list[int] = field(default_factory=list)
    failed: bool = False

    def fail(self) -> None:
        """A file was bad: the request is computed, and what it computes takes the place of what was bad."""
        self.failed, self.saved = True, [0] * len(self.saved)

    def ask(self, start: int) -> None:
        """Note that files are asked for what follows the first ``start`` tokens."""
        self.start = start


class SchedulerSide:
    """Decides what is moved; the worker side moves it.

    Pages go by the tokens alone. Requests with anything else that decides on them (an adapter, an image, embeddings in
    place of tokens) are left out, and so are sessions whose prompts grow.
    """

    def __init__(self, root: Path, groups: Sequence[PageGroup], *, reads: bool, writes: bool) -> None:
        """Wait for the workers to say what their pages are.

        Args:
            root: the folder that engines share.
            groups: KV cache groups.
            reads: whether pages are taken from files.
            writes: whether pages are written to files.
        """
        self._root, self._groups = root, tuple(groups)
        self._reads, self._writes = reads, writes
        self._step, self._end = common_step(groups), common_end(groups)
        self._ranks: list[PageFolder] = []
        self._requests: dict[str, _Known] = {}
        self._loads: dict[str, list[Page]] = {}

    def set_ranks(self, ranks: Iterable[RankPages]) -> None:
        """Take what the workers say of their pages; a block is found if all of them have it."""
        self._ranks = [PageFolder(self._root, rank.fingerprint, rank.page_bytes) for rank in ranks]

    def add(self, request: Any) -> None:
        """A request has come."""
        other = (request.lora_request, request.mm_features, request.prompt_embeds, request.prompt_is_token_ids)
        if any(x is not None and x != [] for x in other) or request.resumable:
            return
        keys = TokenKeys(request.cache_salt, self._step)
        self._requests[request.request_id] = _Known(request, keys, saved=[0] * len(self._groups))

    def remove(self, request_id: str) -> None:
        """A request has ended."""
        self._requests.pop(request_id, None)

    def failed(self, request_ids: Iterable[str]) -> None:
        """Files of requests were found to be bad when they were read: these requests are computed."""
        for request_id in request_ids:
            if request_id in self._requests:
                self._requests[request_id].fail()

    def more_tokens(self, request: Any, start: int) -> int:
        """How many tokens of a request files have beyond those of the engine's own cache.

        Args:
            request: vLLM's ``Request``.
            start: tokens that its own cache has.
        """
        known = self._requests.get(request.request_id)
        asks = self._reads and self._ranks and not request.skip_reading_prefix_cache
        if known is None or known.failed or not asks or start % self._end:
            return 0
        known.ask(start)
        # The last token is computed in any case: its logits are wanted.
        most = (request.num_tokens - 1) // self._end * self._end
        known.keys.extend(request.all_token_ids[:most])
        return self._longest(known.keys, start, most) - start

    def _longest(self, keys: TokenKeys, start: int, most: int) -> int:
        """Tokens up to which files have all that layers see, at least ``start``."""
        found: dict[tuple[int, int], bool] = {}

        def holds(index: int, block: int) -> bool:
            if (index, block) not in found:
                key = keys.at((block + 1) * self._groups[index].block_size)
                found[index, block] = all(rank.holds(index, key) for rank in self._ranks)
            return found[index, block]

        end = start
        whole = [index for index, group in enumerate(self._groups) if group.window is None]
        while end < most and all(
            holds(index, block) for index in whole for block in self._groups[index].needed(end, end + self._end)
        ):
            end += self._end
        # Of windows the last blocks suffice.
        while end > start and not all(
            holds(index, block) for index, group in enumerate(self._groups) for block in group.needed(start, end)
        ):
            end -= self._end
        return max(start, end)

    def allocated(self, request: Any, blocks: Sequence[Sequence[int]], tokens: int) -> None:
        """A request has got blocks; note what is to be read into them.

        Args:
            request: vLLM's ``Request``.
            blocks: of every group, ids of its blocks; 0 where layers see none.
            tokens: tokens to be read from files, as :meth:`more_tokens` said; 0 for none.
        """
        known = self._requests.get(request.request_id)
        if known is None or not tokens:
            return
        end = known.start + tokens
        pages = []
        for index, group in enumerate(self._groups):
            for block in group.needed(known.start, end):
                if blocks[index][block]:
                    pages.append(Page(index, known.keys.at((block + 1) * group.block_size), blocks[index][block]))
            known.saved[index] = max(known.saved[index], end // group.block_size)
        self._loads[request.request_id] = pages

    def transfers(self, output: Any) -> PageTransfers:
        """What is moved in a step.

        Args:
            output: vLLM's ``SchedulerOutput`` of the step.
        """
        loads, self._loads = self._loads, {}
        saves: list[Page] = []
        for request_id, scheduled in output.num_scheduled_tokens.items() if self._writes else ():
            known = self._requests.get(request_id)
            if known is not None:
                blocks = output.kv_connector_block_state.get_block_ids(request_id)
                saves += self._whole_blocks(known, blocks, scheduled)
        return PageTransfers(loads, saves)

    def _whole_blocks(self, known: _Known, blocks: Sequence[Sequence[int]], scheduled: int) -> list[Page]:
        """Blocks of a request that are whole once the step is done, and were not before."""
        request = known.request
        # Drafted tokens are none of the request's before they are kept, and are written again if they are not.
        computed = min(request.num_computed_tokens + scheduled, request.num_tokens)
        pages = []
        for index, group in enumerate(self._groups):
            first, last = known.saved[index], computed // group.block_size
            if last <= first:
                continue
            known.keys.extend(request.all_token_ids[: last * group.block_size])
            for block in range(first, last):
                # Behind a window layers have given their blocks away.
                if blocks[index][block]:
                    pages.append(Page(index, known.keys.at((block + 1) * group.block_size), blocks[index][block]))
            known.saved[index] = last
        return pages
