"""What is computed once per object and forgotten together with it."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def per_object(make: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function whose results are kept for as long as its first argument lives.

    Args:
        make: called with an object that can be weakly referenced and is compared by identity, and with hashable
            arguments, all by position; once for each combination. Its result must not hold the object.

    Returns:
        The function. Its attribute ``kept`` maps ids of live objects to their results.
    """
    kept: dict[int, dict[tuple[Any, ...], Result]] = {}

    @functools.wraps(make)
    def once(*arguments: Any) -> Result:
        owner, rest = arguments[0], arguments[1:]
        results = kept.get(id(owner))
        if results is None:
            results = kept[id(owner)] = {}
            weakref.finalize(owner, kept.pop, id(owner), None)
        if rest not in results:
            results[rest] = make(*arguments)  # type: ignore[call-arg]
        return results[rest]

    once.kept = kept  # type: ignore[attr-defined]
    return once  # type: ignore[return-value]
