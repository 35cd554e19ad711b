"""Speeds of the default method by processor, from all result files: they do not travel from one to the next."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.files import read_json

METHOD, MODEL, OPERATION_MODEL = "xquant", "smollm2-135m-instruct", "smollm2-135m"
COLUMNS = {
    ("attention", 512): "attention, 8 x 512",
    ("attention", 4096): "attention, 8 x 4096",
    ("decode", 512): "decode, 512 tokens",
    ("decode", 4096): "decode, 4096 tokens",
    ("pressure", None): "memory pressure",
}
"""What is compared, and what the table calls it."""

Cell = tuple[str, int | None]


@dataclass
class Processor:
    """What is known of one.

    Attributes:
        name: as it calls itself.
        about: model, flags that choose kernels, and last cache; empty where it was not recorded.
        ratios: by :data:`COLUMNS`, in times 16 bit: the median and, where known, what it is spread over.
        files: where they are from, below the folder of results.
    """

    name: str
    about: str = ""
    ratios: dict[Cell, dict[str, float]] = field(default_factory=dict)
    files: dict[Cell, str] = field(default_factory=dict)

    def worst(self) -> float:
        """The smallest ratio of decoding and attention."""
        return min(ratio["median"] for (what, _), ratio in self.ratios.items() if what != "pressure")


def processors(results: Path) -> list[Processor]:
    """All of them, the worst first. Where several files have a figure, the newest counts.

    Args:
        results: the folder of results; those in ``cpu`` and below are read.
    """
    found: dict[tuple[str, str | None], Processor] = {}
    files = {path: read_json(path) for path in (results / "cpu").rglob("*.json")}
    for path, result in sorted(files.items(), key=lambda item: (item[1]["machine"]["date"], str(item[0]))):
        for cell, ratio in _cells(result):
            machine = result["machine"]
            # Virtual machines call very different processors by one name.
            key = (machine["processor"], machine.get("instruction_set"))
            processor = found.setdefault(key, Processor(machine["processor"]))
            processor.about = about(machine) or processor.about
            processor.ratios[cell], processor.files[cell] = ratio, str(path.relative_to(results))
    known = [processor for processor in found.values() if any(what != "pressure" for what, _ in processor.ratios)]
    return sorted(known, key=Processor.worst)


def about(machine: dict[str, Any]) -> str:
    """What decides which kernels run, in words."""
    words = []
    if machine.get("model") is not None:
        family = f"family {machine['family']}, " if machine.get("family") is not None else ""
        words.append(f"{family}model {machine['model']}")
    words += [machine.get("features") or " ".join(machine.get("flags", []))]
    if machine.get("l3"):
        words.append(f"{machine['l3']} of L3")
    return "; ".join(word for word in words if word)


def table(results: Path) -> str:
    """As Markdown."""
    lines = [f"| processor | {' | '.join(COLUMNS.values())} |", "|" + "---|" * (1 + len(COLUMNS))]
    for processor in processors(results):
        cells = [processor.name + (f" ({processor.about})" if processor.about else "")]
        cells += [spread(processor.ratios[cell]) if cell in processor.ratios else "" for cell in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(ratio: dict[str, float]) -> str:
    """A median and the quartiles, if there are any."""
    ends = f" ({ratio['low']:.2f}-{ratio['high']:.2f})" if "low" in ratio else ""
    return f"{ratio['median']:.2f}{ends}"


def _cells(result: dict[str, Any]) -> Iterator[tuple[Cell, dict[str, float]]]:
    """What a result says of the default method."""
    kind, rows = result["benchmark"], result["rows"]
    if kind == "reported":
        yield from (((row["what"], row["context"]), row["ratio"]) for row in rows)
    elif kind == "decode attention":
        for row in rows:
            if (row["variant"], row["model"], row["sequences"]) == (f"{METHOD} 4 bits", OPERATION_MODEL, 8):
                yield from _known("attention", row["context"], row["speed_of_baseline"])
    elif kind == "offline" and result["model"] == MODEL and result["compiled"]:
        for row in rows:
            if row["method"] == METHOD:
                yield from _known("decode", row["context"], row["decode_ratio"])
    elif kind == "serving" and result["model"] == MODEL and result["trace"]["name"] == "pressure":
        for row in rows:
            if row["method"] == METHOD:
                yield from _known("pressure", None, row["throughput_ratio"])


def _known(what: str, context: int | None, ratio: dict[str, float]) -> Iterator[tuple[Cell, dict[str, float]]]:
    if (what, context) in COLUMNS:
        yield (what, context), ratio
