"""Prompts that hide a number in a long text and ask for it at the end."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xquant_vllm.errors import RefusedError, counted
from xquant_vllm.offline.texts import opening_tokens

_CITIES = ("Oslo", "Lima", "Cairo", "Paris", "Rome", "Tokyo", "Delhi", "Berlin", "Madrid", "Dublin")
_HAYSTACK = "<<<haystack>>>"
_SEED = 2508


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt and its only right answer.

    Attributes:
        length: tokens of prompt and answer.
        depth: where the number stands: 0 at the beginning of the text, 1 at its end.
        prompt: its tokens, int64.
        answer: those of the number.
    """

    length: int
    depth: float
    prompt: torch.Tensor
    answer: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        """Prompt and answer, ``[length]``."""
        return torch.cat((self.prompt, self.answer))

    @property
    def window(self) -> torch.Tensor:
        """What a model reads to predict every token of the answer from those before it."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class _Frame:
    """All tokens but the text's."""

    before: list[int]
    needle: list[int]
    after: list[int]
    answer: list[int]

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.before) + len(self.needle) + len(self.after) + len(self.answer)


def needle_prompts(
    tokenizer: Any, text: str, name: str, lengths: Sequence[int], depths: Sequence[float], trials: int
) -> Iterator[NeedlePrompt]:
    """Prompts of all lengths and depths, always the same ones for the same arguments.

    Models with a chat template are asked in a chat whose answer has begun ("The magic number of Oslo is"), others by
    the same words at the end of the text.

    Args:
        tokenizer: of the model.
        text: to hide the number in.
        name: what it is called, for the error.
        lengths: tokens of prompts and answers.
        depths: from 0 to 1.
        trials: prompts for each length and depth, with other numbers and other parts of the text.

    Raises:
        RefusedError: the text is too short, or a number makes no sense.
    """
    for depth in depths:
        if not 0 <= depth <= 1:
            raise RefusedError(f"xquant: --depths {depth:g} cannot work; set numbers from 0 (start) to 1 (end)")
    if trials < 1:
        raise RefusedError(f"xquant: --trials {trials} cannot work; set 1 or more")
    haystack = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if len(haystack) < max(lengths):
        raise RefusedError(
            f"xquant: the text {name} has {counted(len(haystack), 'token')}, too few for --lengths {max(lengths)}; "
            "give a longer text, or set shorter lengths"
        )
    for length in lengths:
        for depth in depths:
            chance = random.Random(f"{_SEED} {length} {depth:g}")
            for _ in range(trials):
                frame = _frame(tokenizer, chance.choice(_CITIES), chance.randrange(1000, 10000))
                hay = length - frame.size
                if hay < 0:
                    raise RefusedError(
                        f"xquant: --lengths {length} is too short for the question alone; set {length - hay} or more"
                    )
                start = chance.randrange(len(haystack) - hay + 1)
                cut = start + round(hay * depth)
                prompt = [
                    *frame.before,
                    *haystack[start:cut],
                    *frame.needle,
                    *haystack[cut : start + hay],
                    *frame.after,
                ]
                yield NeedlePrompt(length, depth, torch.tensor(prompt), torch.tensor(frame.answer))


def _frame(tokenizer: Any, city: str, number: int) -> _Frame:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    stem = f"The magic number of {city} is"
    before, after = opening_tokens(tokenizer), f"\n\n{stem}"
    if getattr(tokenizer, "chat_template", None):
        user = {"role": "user", "content": f"{_HAYSTACK}\n\nWhat is the magic number of {city}?"}
        chat: str = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        head, _, tail = chat.partition(_HAYSTACK)
        # The template brings its own BOS token.
        before, after = encode(head), tail + stem
    # Tokenized together, because a number is not the same tokens at the start of a text.
    asked, answered = encode(after), encode(f"{after} {number}")
    shared = next((i for i, (a, b) in enumerate(zip(asked, answered, strict=False)) if a != b), len(asked))
    return _Frame(before, encode(f"\n\n{stem} {number}.\n\n"), answered[:shared], answered[shared:])
