import gc

import pytest

from xquant_vllm.attention.per_object import per_object


class Owner:
    """Equal to all others: only identity may count."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None


@pytest.fixture
def calls():
    return []


@pytest.fixture
def made(calls):
    @per_object
    def make(owner, *rest):
        calls.append(rest)
        if "bad" in rest:
            raise ValueError("bad")
        return [*rest]

    return make


def test_is_made_once_for_every_object_and_argument(made, calls):
    first, second = Owner(), Owner()
    assert made(first, 1) is made(first, 1)
    assert made(first, 1) is not made(second, 1)
    assert made(first, 2) == [2]
    assert calls == [(1,), (1,), (2,)]


def test_is_forgotten_together_with_the_object(made):
    owner, other = Owner(), Owner()
    made(owner, 1), made(owner, 2), made(other, 1)
    assert len(made.kept) == 2
    del owner
    gc.collect()
    assert list(made.kept) == [id(other)]


def test_an_error_is_not_kept(made, calls):
    owner = Owner()
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            made(owner, "bad")
    assert calls == [("bad",), ("bad",)]
