"""A trace: requests in the order in which they arrive, with the blocks that their prompts are made of."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from xquant_vllm.errors import RefusedError


@dataclass(frozen=True)
class TracedRequest:
    """One request.

    Attributes:
        time: seconds when it arrives.
        prompt: tokens of its prompt.
        output: tokens of its answer.
        blocks: names of the whole blocks of the prompt, in order. A block has the same name in two requests if it and
            all before it are the same tokens.
        answers: names of the whole blocks that prompt and answer fill together beyond those, as far as they are known.
    """

    time: float
    prompt: int
    output: int
    blocks: tuple[Hashable, ...]
    answers: tuple[Hashable, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Requests of one file.

    Attributes:
        name: of the file.
        block_size: tokens of a block.
        timed: whether the file says when requests arrive; else each comes when the one before has ended.
        requests: by arrival.
    """

    name: str
    block_size: int
    timed: bool
    requests: tuple[TracedRequest, ...]

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(request.prompt for request in self.requests)


def sorted_trace(name: str, block_size: int, timed: bool, requests: Sequence[TracedRequest]) -> Trace:
    """A trace of requests in any order.

    Raises:
        RefusedError: there are none.
    """
    if not any(request.prompt for request in requests):
        raise RefusedError(f"xquant: --trace {name} has no requests; name a file with one JSON object a line")
    by_time = sorted(requests, key=lambda request: request.time) if timed else requests
    return Trace(name, block_size, timed, tuple(by_time))
