"""The pages of the documentation, and the blocks of commands and of Python in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# Why a block is not run. One of these stands in a comment on the line above the block.
REASONS = ("needs a GPU", "needs the network", "takes minutes", "your own files")

_MARK = re.compile(r"<!-- not run: (.*) -->")
_FENCE = re.compile(r"(\s*)```(\S*)\s*$")
_LANGUAGES = ("console", "python")
_FOLDERS = ("docs", "examples", "xquant_vllm", "csrc", "benchmarks", ".github")


def pages() -> list[Path]:
    """All pages that people read: those of the root folder, of docs/, and the READMEs of other folders."""
    return sorted(ROOT.glob("*.md")) + sorted(path for name in _FOLDERS for path in (ROOT / name).rglob("*.md"))


def page_name(page: Path) -> str:
    """A page's path in the repository."""
    return str(page.relative_to(ROOT))


@dataclass
class Block:
    """A fenced block.

    Attributes:
        where: page and line, for messages.
        language: ``"console"`` or ``"python"``.
        reason: why it is not run; None if it is.
        lines: its lines, without indentation.
    """

    where: str
    language: str
    reason: str | None
    lines: list[str] = field(default_factory=list)

    def commands(self) -> list[str]:
        """Commands of a console block: the lines after ``$ ``, continued where they end in a backslash."""
        commands: list[str] = []
        continues = False
        for line in self.lines:
            if line.startswith("$ "):
                commands.append(line[2:])
            elif continues:
                commands[-1] += f"\n{line}"
            else:
                continue
            continues = line.endswith("\\")
        return [command.replace("\\\n", " ") for command in commands]


def blocks(text: str, name: str) -> list[Block]:
    """The blocks of a page that hold commands or Python.

    Raises:
        ValueError: a block is marked with a reason that is not one of ``REASONS``, or a mark has no block below it.
    """
    return list(_blocks(text.splitlines(), name))


def _blocks(lines: list[str], name: str) -> Iterator[Block]:
    reason, marked_at = None, 0
    block: Block | None = None
    fence, skipped = "", False
    for number, line in enumerate(lines, 1):
        found = _FENCE.match(line)
        if block is not None or skipped:
            if found and not found[2]:
                if block is not None:
                    yield block
                block, skipped = None, False
            elif block is not None:
                block.lines.append(line.removeprefix(fence))
            continue
        if found:
            skipped = found[2] not in _LANGUAGES
            if reason is not None and skipped:
                raise ValueError(f"{name}:{marked_at}: the block below this mark is none that would be run")
            if not skipped:
                fence, block = found[1], Block(f"{name}:{number}", found[2], reason)
            reason = None
        elif mark := _MARK.search(line):
            reason, marked_at = mark[1], number
            if reason not in REASONS:
                raise ValueError(f"{name}:{number}: unknown reason {reason!r}: write one of {', '.join(REASONS)}")
        elif reason is not None:
            raise ValueError(f"{name}:{marked_at}: the line below this mark opens no block")
    if block is not None or skipped or reason is not None:
        raise ValueError(f"{name}: a block is not closed, or a mark has no block below it")
