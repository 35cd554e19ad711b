"""Keys of blocks."""

import hashlib

from xquant_vllm.plugin.connectors.keys import TokenKeys


def keys_of(tokens, salt=None, step=4):
    keys = TokenKeys(salt, step)
    keys.extend(tokens)
    return keys


def test_a_key_is_of_all_tokens_before():
    """By the formula, written down a second time."""
    expected = hashlib.sha256(b"").digest()
    for part in ([1, 2, 3, 4], [5, 6, 7, 70000]):
        expected = hashlib.sha256(expected + b"".join(token.to_bytes(8, "little") for token in part)).digest()
    keys = keys_of([1, 2, 3, 4, 5, 6, 7, 70000, 9])
    assert keys.at(8) == expected
    assert keys_of([2, 2, 3, 4, 5, 6, 7, 70000]).at(8) != expected
    assert keys.at(4) != keys.at(8)


def test_tokens_may_come_in_pieces():
    whole, pieces = keys_of(range(23)), TokenKeys(None, 4)
    for end in (1, 3, 4, 9, 9, 5, 23):
        pieces.extend(range(end))
    assert [pieces.at(end) for end in range(4, 21, 4)] == [whole.at(end) for end in range(4, 21, 4)]


def test_salts_share_nothing():
    keys = {keys_of(range(4), salt).at(4) for salt in (None, "", "a", "b")}
    assert len(keys) == 4
