"""The batches with which an engine starts, so that it compiles nothing while it serves.

Kernels are compiled for what there is of these in a batch: one query token or more, a store of few tokens or many, one
split of a context or several, a prompt that passes through the workspace of prefill at once or in rounds.
"""

Lengths = tuple[tuple[int, int], ...]
"""Query tokens and cached tokens of every sequence of a batch."""

# Query tokens from which on a program of a store has several, and cached tokens that take prefill several rounds.
MANY_TOKENS = 256
LONG_CONTEXT = 20000


def start_up_batches(decode_tokens: int, tokens: int, sequences: int, length: int) -> list[Lengths]:
    """The batches.

    Args:
        decode_tokens: query tokens of a decoding sequence at most.
        tokens: query tokens of a batch at most.
        sequences: sequences of a batch at most.
        length: cached tokens of a sequence at most.
    """
    prompt = min(max(MANY_TOKENS, decode_tokens + 1), tokens, length)
    batches: list[Lengths] = []
    for new in sorted({1, min(decode_tokens, prompt)}):
        batches += [((new, new),) * count for count in sorted({1, max(1, min(sequences, tokens // new))})]
    batches += [((prompt, prompt),), ((prompt, max(prompt, min(length, LONG_CONTEXT))),)]
    beside = min(prompt, tokens - 1)
    if sequences > 1 and beside > decode_tokens:
        batches.append(((1, 1), (beside, beside)))
    return list(dict.fromkeys(batches))
