"""The requests of a soak, drawn from a seed: all kinds that operators see, a third of them unfinished or wrong."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MODEL_NAME = "soaked"
# Of the server; prompts that are served leave room for their answers.
MAX_MODEL_LEN = 512
_LONGEST_PROMPT_WORDS, _LONGEST_ANSWER = 130, 64
_SHARED_PREFIXES = 4

# Kind -> how often of all. Kinds above the line must be answered in full.
WEIGHTS = {
    "whole": 20,
    "stream": 22,
    "several answers": 6,
    "log-probabilities": 6,
    "shared prefix": 14,
    # ---
    "aborted stream": 10,
    "disconnected": 8,
    "invalid": 14,
}


@dataclass(frozen=True)
class Request:
    """What is sent, and what must come back.

    Attributes:
        kind: a key of ``WEIGHTS``; of an invalid one, what is wrong with it follows a colon.
        body: of a POST to ``/v1/completions``.
        streams: the answer comes in events.
        tokens: generated in all that a full answer reports; 0 where none is waited for.
        leaves_after: events after which the client leaves; 0: as soon as all is sent; None: it stays.
        is_valid: answered with 200; else with a status from 400 to 499.
    """

    kind: str
    body: bytes
    streams: bool = False
    tokens: int = 0
    leaves_after: int | None = None
    is_valid: bool = True


class Load:
    """Draws requests."""

    def __init__(self, words: Sequence[str], seed: int, samples: bool = True) -> None:
        """Take the words of a text, which prompts are cut from; without ``samples`` all answers are greedy."""
        self._words, self._samples = words, samples
        self._random = random.Random(seed)
        self._prefixes = [self._text(60) for _ in range(_SHARED_PREFIXES)]

    def requests(self, count: int) -> list[Request]:
        """So many, every kind as often as its weight says."""
        drawn = self._random.choices([*WEIGHTS], [*WEIGHTS.values()], k=count)
        return [self.request(kind) for kind in drawn]

    def request(self, kind: str) -> Request:
        """One of a kind."""
        if kind == "invalid":
            return self._invalid()
        body = self._body(self._text(self._random.randint(2, _LONGEST_PROMPT_WORDS)))
        answer = self._random.randint(2, _LONGEST_ANSWER)
        leaves_after, choices = None, 1
        if kind == "several answers" and self._samples:
            choices = self._random.randint(2, 4)
            body |= {"n": choices, "temperature": 0.8, "seed": self._random.randrange(10**6)}
        elif kind == "log-probabilities":
            body |= {"logprobs": self._random.choice((0, 1, 5)), "echo": self._random.random() < 0.3}
        elif kind == "shared prefix":
            body["prompt"] = f"{self._random.choice(self._prefixes)} {self._text(self._random.randint(2, 40))}"
        elif kind == "aborted stream":
            leaves_after, answer = self._random.randint(1, 8), 4 * _LONGEST_ANSWER
        elif kind == "disconnected":
            leaves_after, answer = 0, 4 * _LONGEST_ANSWER
        streams = kind in ("stream", "aborted stream") or (kind == "shared prefix" and self._random.random() < 0.5)
        if streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        body["max_tokens"] = answer
        tokens = 0 if leaves_after is not None else choices * answer
        return Request(kind, json.dumps(body).encode(), streams, tokens, leaves_after)

    def _text(self, words: int) -> str:
        start = self._random.randrange(len(self._words) - words)
        return " ".join(self._words[start : start + words])

    def _body(self, prompt: str) -> dict[str, Any]:
        body = {"model": MODEL_NAME, "prompt": prompt, "ignore_eos": True, "max_tokens": 8}
        if not self._samples or self._random.random() < 0.5:
            return body | {"temperature": 0}
        return body | {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": self._random.randrange(10**6)}

    def _invalid(self) -> Request:
        body = self._body(self._text(12))
        wrong: dict[str, Any] = {
            "temperature": {"temperature": -1},
            "top_p": {"top_p": 7},
            "a word for a number": {"temperature": "hot"},
            "max_tokens": {"max_tokens": -3},
            "answer beyond the model's length": {"max_tokens": 50 * MAX_MODEL_LEN},
            "prompt beyond the model's length": {"prompt": self._text(3 * MAX_MODEL_LEN)},
            "prompt of a million characters": {"prompt": "word " * 200_000},
            "token that is not in the vocabulary": {"prompt": [5, 10**7, 6]},
            "negative token": {"prompt": [5, -1, 6]},
            "too many log-probabilities": {"logprobs": 10**5},
            "no answers": {"n": 0},
            "unknown model": {"model": "another"},
            "JSON cut off": None,
            "no JSON": None,
            "empty": None,
        }
        name = self._random.choice([*wrong])
        if wrong[name] is not None:
            sent = json.dumps(body | wrong[name]).encode()
        else:
            sent = {"JSON cut off": json.dumps(body).encode()[:-9], "no JSON": b"\xff\x00{", "empty": b""}[name]
        return Request(f"invalid: {name}", sent, is_valid=False)


def probe(salt: str) -> Request:
    """The same question every time, which no cached prefix answers: a salt makes its blocks its own."""
    text = "A class definition defines a class object. The class suite is then executed in a new execution frame. " * 6
    body = {"model": MODEL_NAME, "prompt": text, "temperature": 0, "max_tokens": 24, "ignore_eos": True, "logprobs": 5,
            "cache_salt": salt}  # fmt: skip
    return Request("probe", json.dumps(body).encode(), tokens=24)
