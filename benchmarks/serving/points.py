"""The points of a sweep, and which of them are measured already."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.files import read_json


class PointError(Exception):
    """A sweep cannot run; the message says why and what to do."""


@dataclass(frozen=True)
class Point:
    """One model under one load with some methods.

    Attributes:
        model: folder or hub name.
        trace: the load.
        methods: names, measured in turns.
        options: others of bench_serving.py.
    """

    model: str
    trace: str
    methods: tuple[str, ...]
    options: tuple[str, ...]

    def file(self, folder: Path) -> Path:
        """Where its result is kept: another set of methods is another point."""
        return folder / f"{Path(self.model).name}--{self.trace}--{'+'.join(self.methods)}.json"

    def identity(self) -> dict[str, Any]:
        """What a result file says it is of; the model by its name alone, wherever it lies."""
        return {"point": asdict(self) | {"model": Path(self.model).name, "methods": [*self.methods],
                                         "options": [*self.options]}}  # fmt: skip


def points(models: Iterable[str], traces: Iterable[str], methods: Sequence[str], options: Sequence[str]) -> list[Point]:
    """All of them.

    Raises:
        PointError: two models have the same name, so that their results would be in the same file.
    """
    names: dict[str, str] = {}
    for model in models:
        if names.setdefault(Path(model).name, model) != model:
            raise PointError(f"--models {names[Path(model).name]} and {model} have the same name; rename a folder")
    pairs = itertools.product(names.values(), traces)
    return [Point(model, trace, tuple(methods), tuple(options)) for model, trace in pairs]


def missing(of: Iterable[Point], folder: Path) -> list[Point]:
    """Those without a result.

    Raises:
        PointError: a result is there that was measured with other options.
    """
    without = []
    for point in of:
        file = point.file(folder)
        if not file.exists():
            without.append(point)
        elif (found := read_json(file)["point"]) != point.identity()["point"]:
            then, now = (" ".join(options) or "none" for options in (found["options"], point.options))
            raise PointError(
                f"{file} was measured with other options ({then}; now: {now}); give another folder with --out, or "
                "delete it"
            )
    return without
