"""Which tokens pages belong to: a key for every block of a request.

Of vLLM's own hashes of blocks it is for every engine to decide how they are made, so they mean nothing to another one.
A key is the SHA-256 of all tokens from the first to the end of the block, and of the salt that the client gave.
"""

import hashlib
from array import array
from collections.abc import Sequence


class TokenKeys:
    """The keys of one request, made as its tokens come."""

    def __init__(self, salt: str | None, step: int) -> None:
        """Of no tokens yet.

        Args:
            salt: requests of different salts share no pages, or None.
            step: tokens from one key to the next; divides the block size of every KV cache group.
        """
        self._step = step
        self._keys: list[bytes] = [hashlib.sha256(b"" if salt is None else b"salt " + salt.encode()).digest()]

    def extend(self, tokens: Sequence[int]) -> None:
        """Take all tokens of the request so far; those that were there before are not looked at again."""
        for end in range(len(self._keys) * self._step, len(tokens) + 1, self._step):
            # 8 bytes of every token, in the order of the machine: folders are not shared by machines of other orders.
            digest = hashlib.sha256(self._keys[-1])
            digest.update(array("q", tokens[end - self._step : end]).tobytes())
            self._keys.append(digest.digest())

    def at(self, end: int) -> bytes:
        """The key of a block that ends behind so many tokens, a multiple of the step, at least one."""
        return self._keys[end // self._step]
