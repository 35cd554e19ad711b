"""The requests of a load, the same for every method: made from a seed, written as a file for `vllm bench serve`.

**pressure** is a multi-turn load: users come back round robin, each with a history that has grown by what was said
last. A cache that holds all histories prefills only what is new; a smaller one has evicted a history just before its
user comes back (least recently used goes first), and prefills all of it again. Replies are part of the script, so that
every server sees the same text whatever it answers.

**arrivals** are unrelated requests with random lengths that arrive as a Poisson process.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trace:
    """Requests in the order in which they are sent.

    Attributes:
        name: of the load.
        prompts: texts.
        outputs: tokens that each is answered with.
        concurrency: requests that are under way at most; None: no limit.
        rate: requests per second on average, Poisson; None: the next one goes when another has ended.
        seed: of the prompts and the arrivals.
    """

    name: str
    prompts: tuple[str, ...]
    outputs: tuple[int, ...]
    concurrency: int | None
    rate: float | None
    seed: int

    def write(self, path: Path) -> None:
        """As a dataset of `vllm bench serve`."""
        rows = zip(self.prompts, self.outputs, strict=True)
        lines = [json.dumps({"prompt": prompt, "output_tokens": tokens}) for prompt, tokens in rows]
        path.write_text("\n".join(lines) + "\n")


class RunningText:
    """A text in tokens of the model that is served, so that prompts have the lengths that they are said to have."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        """Take a tokenizer of transformers and a text long enough that places in it differ."""
        self._tokenizer = tokenizer
        self._tokens = self.tokens_of(text)

    def tokens_of(self, text: str) -> list[int]:
        """Without those that the server puts before every prompt."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return tokens

    def from_tokens(self, tokens: list[int]) -> str:
        """The text, of about as many tokens when it is read again."""
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    def source(self, seed: int) -> Callable[[int], list[int]]:
        """Calls with a number of tokens, each of which continues behind the last one, from a place of the seed's."""
        position = random.Random(seed).randrange(len(self._tokens))

        def following(count: int) -> list[int]:
            nonlocal position
            taken = [self._tokens[(position + i) % len(self._tokens)] for i in range(count)]
            position += count
            return taken

        return following


def pressure(
    text: RunningText,
    *,
    users: int,
    turns: int,
    history_tokens: int,
    turn_tokens: int,
    output_tokens: int,
    concurrency: int,
    seed: int,
) -> Trace:
    """Every user's first turn, then every user's second, and so on.

    Args:
        text: what is talked about.
        users: who come back round robin.
        turns: of every user, the first with the whole history.
        history_tokens: of a user's first prompt.
        turn_tokens: by which a history grows from turn to turn, the scripted reply included.
        output_tokens: of every answer.
        concurrency: requests under way.
        seed: of where in the text users begin.
    """
    sources = [text.source(seed * users + user) for user in range(users)]
    # A first line of one's own: no two users share a prefix.
    histories = [text.tokens_of(f"Conversation {seed}-{user}. ") for user in range(users)]
    prompts = []
    for turn in range(turns):
        for history, source in zip(histories, sources, strict=True):
            history += source(turn_tokens if turn else history_tokens - len(history))
            prompts.append(text.from_tokens(history))
    outputs = (output_tokens,) * len(prompts)
    return Trace("pressure", tuple(prompts), outputs, concurrency, None, seed)


def arrivals(
    text: RunningText, *, requests: int, rate: float, prompt_tokens: int, output_tokens: int, seed: int
) -> Trace:
    """Prompts of half to one and a half times ``prompt_tokens``, answers likewise of ``output_tokens``."""
    drawn = random.Random(seed)
    prompts, outputs = [], []
    for index in range(requests):
        source = text.source(seed * requests + index)
        begin = text.tokens_of(f"Request {seed}-{index}. ")
        prompts.append(text.from_tokens(begin + source(round(prompt_tokens * (0.5 + drawn.random())))))
        outputs.append(max(1, round(output_tokens * (0.5 + drawn.random()))))
    return Trace("arrivals", tuple(prompts), tuple(outputs), None, rate, seed)
