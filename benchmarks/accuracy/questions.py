"""The tables of docs/evaluation-vllm.md that say how many questions are answered with each cache."""

from pathlib import Path
from typing import Any

from benchmarks.accuracy.answers import Answers, Share, changed, difference, share

BEGIN, END = "<!-- table: made by benchmarks/ask_questions.py --write -->", "<!-- end of table -->"
BASELINE = "16 bit"


def write_tables(result: dict[str, Any], path: Path) -> None:
    """Replace what is between the marks.

    Args:
        result: what benchmarks/ask_questions.py has written.
        path: of the page.
    """
    path.write_text(page(path.read_text(), result))


def page(text: str, result: dict[str, Any]) -> str:
    """The page with its tables made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{shares(result)}\n\n{differences(result)}\n{END}{after}"


def shares(result: dict[str, Any]) -> str:
    """Right answers of every cache to every task, as Markdown."""
    names = [_short(task) for task in result["tasks"]]
    plain = _baseline(result)["bytes_per_token"]
    lines = [
        "Right answers in percent, with 95% intervals:",
        "",
        f"| cache | bytes per token | tokens, times 16 bit | mean | {' | '.join(names)} |",
        "|" + "---|" * (4 + len(names)),
    ]
    for row in _by_bytes(result):
        answers = _answers(row, result)
        size = row["bytes_per_token"]
        cells = [_name(row), f"{size:,.0f}", f"{plain / size:.2f}", _percent(share(answers))]
        lines.append(f"| {' | '.join([*cells, *(_percent(share([task])) for task in answers)])} |")
    return "\n".join(lines)


def differences(result: dict[str, Any]) -> str:
    """How many more answers than 16 bit's are right, in points, as Markdown."""
    names = [_short(task) for task in result["tasks"]]
    plain = _answers(_baseline(result), result)
    questions = sum(task["questions"] for task in result["tasks"].values())
    lines = [
        f"Difference to 16 bit on the same {questions:,} questions, in points, with 95% intervals:",
        "",
        f"| cache | bytes per token | mean | {' | '.join(names)} | answers lost, won |",
        "|" + "---|" * (4 + len(names)),
    ]
    for row in _by_bytes(result):
        if row["name"] == BASELINE:
            continue
        answers = _answers(row, result)
        pairs = zip(answers, plain, strict=True)
        lost, won = changed(answers, plain)
        cells = [_name(row), f"{row['bytes_per_token']:,.0f}", _points(difference(answers, plain))]
        cells += [_points(difference([ours], [theirs])) for ours, theirs in pairs]
        lines.append(f"| {' | '.join([*cells, f'{lost}, {won}'])} |")
    return "\n".join(lines)


def _baseline(result: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["name"] == BASELINE)


def _by_bytes(result: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(result["rows"], key=lambda row: -row["bytes_per_token"])


def _answers(row: dict[str, Any], result: dict[str, Any]) -> list[Answers]:
    return [Answers(row["right"][task], about["together"]) for task, about in result["tasks"].items()]


def _short(task: str) -> str:
    return f"`{task.removeprefix('xquant_')}`"


def _name(row: dict[str, Any]) -> str:
    return f"**{row['name']}**" if row["name"].startswith("xquant") else row["name"]


def _percent(found: Share) -> str:
    return f"{100 * found.value:.1f} ({100 * found.least:.0f}-{100 * found.most:.0f})"


def _points(found: Share) -> str:
    return f"{100 * found.value:+.1f} ({100 * found.least:+.1f} to {100 * found.most:+.1f})"
