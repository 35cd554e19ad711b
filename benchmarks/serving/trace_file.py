"""A load from a file of requests that name their blocks (hash_ids), made smaller and slower, as prompts of tokens.

Blocks are random tokens, the same wherever a hash id is the same; so what a server finds in its cache is what the
trace's own server would have found, but for the scale. `xquant plan` reads the same form and says what to expect.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from xquant_vllm.errors import RefusedError
from xquant_vllm.planning.traces.hashed import HASHED_BLOCK, hashed_requests
from xquant_vllm.planning.traces.lines import read_lines
from xquant_vllm.planning.traces.replay import Rates, replay
from xquant_vllm.planning.traces.requests import Trace, TracedRequest


@dataclass(frozen=True)
class Scale:
    """How a trace is made to fit a machine.

    Attributes:
        lengths: by which lengths are multiplied; a block must keep whole tokens.
        times: by which times are multiplied.
        requests: how many are taken, from the beginning; None: all.
    """

    lengths: float = 1.0
    times: float = 1.0
    requests: int | None = None

    @property
    def block_size(self) -> int:
        """Tokens of a block that a hash id names.

        Raises:
            RefusedError: they are no whole number.
        """
        tokens = HASHED_BLOCK * self.lengths
        if tokens < 1 or tokens != int(tokens):
            raise RefusedError(
                f"--trace-scale-lengths {self.lengths} leaves {tokens} tokens of a block of {HASHED_BLOCK}; set 1, "
                "0.5, 0.25 and so on"
            )
        return int(tokens)


@dataclass(frozen=True)
class FileTrace:
    """A load.

    Attributes:
        trace: its requests, scaled.
        prompts: their tokens.
    """

    trace: Trace
    prompts: tuple[tuple[int, ...], ...]

    def planned_hit_rate(self, cache_tokens: int, rates: Rates) -> float:
        """What the plan's cache of blocks finds on one instance.

        Args:
            cache_tokens: that the server's cache holds.
            rates: how long requests take.
        """
        return replay(self.trace, cache_tokens, 1, rates).hit_rate


def file_trace(path: Path, scale: Scale, vocabulary: int, most_tokens: int) -> FileTrace:
    """A load from a file.

    Args:
        path: the file.
        scale: how it is made to fit.
        vocabulary: tokens are drawn from those below this number.
        most_tokens: of a prompt and its answer; longer requests are left out.

    Raises:
        RefusedError: the file cannot be read, or the scale does not fit.
    """
    size = scale.block_size
    found = list(read_lines(path))
    whole = [[*line.value["hash_ids"]] for line in found if isinstance(line.value, dict) and "hash_ids" in line.value]
    requests, prompts = [], []
    for request, names in list(zip(hashed_requests(found), whole, strict=True))[: scale.requests]:
        # The last block may be one that is not full: as much of it as the prompt has.
        length = max(1, round(request.prompt * scale.lengths))
        tokens = [token for name in names for token in _block(name, size, vocabulary)][:length]
        output = max(1, round(request.output * scale.lengths))
        if len(tokens) + output > most_tokens:
            continue
        requests.append(
            TracedRequest(request.time * scale.times, len(tokens), output, tuple(names[: len(tokens) // size]))
        )
        prompts.append(tuple(tokens))
    if not requests:
        raise RefusedError(f"--trace-file {path} has no request of up to {most_tokens} tokens; scale its lengths down")
    order = sorted(range(len(requests)), key=lambda at: requests[at].time)
    trace = Trace(path.name, size, True, tuple(requests[at] for at in order))
    return FileTrace(trace, tuple(prompts[at] for at in order))


def _block(name: int | str, size: int, vocabulary: int) -> list[int]:
    drawn = random.Random(str(name))
    # Not the first ones, which mean something: beginnings, ends.
    return [drawn.randrange(min(100, vocabulary // 2), vocabulary) for _ in range(size)]
