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

Words = Callable[[int], str]


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


def words(text: str, seed: int) -> Words:
    """A source of running text: each call continues behind the last one, at a place of its own for every seed."""
    of_text = text.split()
    position = random.Random(seed).randrange(len(of_text))

    def following(count: int) -> str:
        nonlocal position
        taken = [of_text[(position + i) % len(of_text)] for i in range(count)]
        position += count
        return " ".join(taken)

    return following


def pressure(
    text: str,
    *,
    users: int,
    turns: int,
    history_words: int,
    turn_words: int,
    output_tokens: int,
    concurrency: int,
    seed: int,
) -> Trace:
    """Every user's first turn, then every user's second, and so on.

    Args:
        text: what is talked about, long enough that histories differ.
        users: who come back round robin.
        turns: of every user, the first with the whole history.
        history_words: of a user's first prompt.
        turn_words: by which a history grows from turn to turn, the scripted reply included.
        output_tokens: of every answer.
        concurrency: requests under way.
        seed: of where in the text users begin.
    """
    sources = [words(text, seed * users + user) for user in range(users)]
    # A first line of one's own: no two users share a prefix.
    histories = [f"Conversation {seed}-{user}. {source(history_words)}" for user, source in enumerate(sources)]
    prompts = []
    for turn in range(turns):
        for user, source in enumerate(sources):
            if turn:
                histories[user] = f"{histories[user]} {source(turn_words)}"
            prompts.append(histories[user])
    outputs = (output_tokens,) * len(prompts)
    return Trace("pressure", tuple(prompts), outputs, concurrency, None, seed)


def arrivals(text: str, *, requests: int, rate: float, prompt_words: int, output_tokens: int, seed: int) -> Trace:
    """Prompts of half to one and a half times ``prompt_words``, answers of half to one and a half ``output_tokens``."""
    drawn = random.Random(seed)
    prompts, outputs = [], []
    for index in range(requests):
        source = words(text, seed * requests + index)
        prompts.append(f"Request {seed}-{index}. {source(round(prompt_words * (0.5 + drawn.random())))}")
        outputs.append(max(1, round(output_tokens * (0.5 + drawn.random()))))
    return Trace("arrivals", tuple(prompts), tuple(outputs), None, rate, seed)
